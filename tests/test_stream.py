"""The stream of groups: when they are started, which are used, which are given up, and what becomes of errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etagent_jax.rollout.stream import GroupStream
from tests.rolls import Rolls, ask, indices, plan, settle, stream_of


async def test_strictly_on_policy_nothing_runs_ahead():
    rolls = Rolls()
    stream = stream_of(rolls)
    assert rolls.started == []
    first = await ask(stream, 0)
    assert rolls.started == [0, 1]
    await rolls.finish(1)
    assert not first.done()
    await rolls.finish(0)
    assert indices(await first) == [0, 1]
    assert rolls.started == [0, 1]
    await ask(stream, 1)
    assert rolls.started == [0, 1, 2, 3]
    await stream.close()


async def test_groups_of_the_next_updates_run_while_the_learner_trains():
    rolls = Rolls()
    stream = stream_of(rolls, max_staleness=2)
    first = await ask(stream, 0)
    assert rolls.started == [0, 1, 2, 3, 4, 5]
    for i in (0, 1, 2):
        await rolls.finish(i)
    assert indices(await first) == [0, 1]
    await rolls.finish(5)
    assert len(rolls.started) == 6
    second = await ask(stream, 1)
    assert len(rolls.started) == 8
    batch = await second
    assert (indices(batch), batch.staleness) == ([2, 5], (1, 1))
    await stream.close()


async def test_a_run_that_begins_at_a_later_version_counts_from_there():
    rolls = Rolls()
    stream = stream_of(rolls, version=40, max_staleness=1)
    await ask(stream, 40)
    assert len(rolls.started) == 4
    await stream.close()


async def test_a_group_with_one_token_too_old_is_dropped_and_another_takes_its_place():
    rolls = Rolls()
    stream = stream_of(rolls, max_staleness=1)
    first = await ask(stream, 0)
    for i in (0, 1):
        await rolls.finish(i)
    await first
    second = await ask(stream, 1)
    for i in (4, 5):
        await rolls.finish(i, (1,))
    assert indices(await second) == [4, 5]
    third = await ask(stream, 2)
    assert rolls.started == [0, 1, 2, 3, 4, 5, 6, 7]
    await rolls.finish(2, (2, 2, 0, 2))
    assert rolls.started[8:] == [8]
    await rolls.finish(3, (1, 2))
    await rolls.finish(8, (2,))
    batch = await third
    assert (indices(batch), batch.staleness, batch.stale) == ([3, 8], (1, 0), 1)
    assert stream.open() == [6, 7]
    await stream.close()


async def test_the_oldest_groups_go_first_and_the_batch_is_in_plan_order():
    rolls = Rolls()
    stream = stream_of(rolls, version=5, max_staleness=3)
    first = await ask(stream, 5)
    for index in (3, 1):
        await rolls.finish(index, (5,))
    assert indices(await first) == [1, 3]
    for index, version in ((0, 5), (4, 4), (2, 5), (7, 3), (5, 4)):
        await rolls.finish(index, (version,))
    second = await stream.next_batch(6)
    assert (indices(second), second.staleness) == ([4, 7], (2, 3))
    third = await stream.next_batch(7)
    assert (indices(third), third.staleness) == ([0, 5], (2, 3))
    await stream.close()


async def test_a_group_with_a_token_of_weights_that_are_not_there_yet_is_given_up():
    rolls = Rolls()
    stream = stream_of(rolls, version=5, max_staleness=1)
    first = await ask(stream, 5)
    await rolls.finish(0, (5, 6))
    assert rolls.started == [0, 1, 2, 3, 4]
    for i in (1, 2):
        await rolls.finish(i, (5,))
    batch = await first
    assert (indices(batch), batch.stale) == ([1, 2], 1)
    await stream.close()


async def test_nothing_is_begun_for_updates_after_the_last():
    rolls = Rolls()
    stream = stream_of(rolls, max_staleness=2, last=1)
    first = await ask(stream, 0)
    assert rolls.started == [0, 1, 2, 3]
    for i in (3, 1):
        await rolls.finish(i)
    await first
    second = await ask(stream, 1)
    for i in (0, 2):
        await rolls.finish(i)
    assert indices(await second) == [0, 2]
    assert rolls.started == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="up to 1, got 2"):
        await stream.next_batch(2)


async def test_a_process_without_a_share_has_empty_batches():
    rolls = Rolls()
    stream = stream_of(rolls, batch=0, max_staleness=1)
    assert [(await stream.next_batch(version)).groups for version in (0, 1)] == [(), ()]
    assert rolls.started == []


async def test_a_group_without_model_tokens_is_never_too_old():
    rolls = Rolls()
    stream = stream_of(rolls, version=7)
    first = await ask(stream, 7)
    await rolls.finish(0, ())
    await rolls.finish(1, (7,))
    assert (await first).staleness == (0, 0)


async def test_groups_without_spread_are_replaced_within_the_budget_and_then_fill_the_batch():
    rolls = Rolls()
    stream = stream_of(rolls, replacements=2)
    first = await ask(stream, 0)
    await rolls.finish(1, spread=False)
    await rolls.finish(0, spread=False)
    assert rolls.started == [0, 1, 2, 3]
    await rolls.finish(3, spread=False)
    assert rolls.started == [0, 1, 2, 3]
    assert not first.done()
    await rolls.finish(2)
    batch = await first
    assert (indices(batch), batch.without_spread) == ([0, 2], 2)
    assert stream.open() == []


async def test_a_group_without_spread_is_replaced_at_once_while_the_learner_trains():
    rolls = Rolls()
    stream = stream_of(rolls, max_staleness=1, replacements=1)
    first = await ask(stream, 0)
    for i in (0, 1):
        await rolls.finish(i)
    await first
    await rolls.finish(3, spread=False)
    assert sorted(rolls.running) == [2, 4]
    await rolls.finish(4, spread=False)
    assert sorted(rolls.running) == [2]
    await stream.close()


async def test_without_a_budget_for_replacements_spread_does_not_matter():
    rolls = Rolls()
    stream = stream_of(rolls, max_staleness=2)
    first = await ask(stream, 0)
    await rolls.finish(0, spread=False)
    await rolls.finish(1)
    batch = await first
    assert (indices(batch), batch.without_spread) == ([0, 1], 0)
    for i in (3, 4, 2):
        await rolls.finish(i, spread=i > 2)
    assert indices(await stream.next_batch(1)) == [2, 3]
    await stream.close()


async def test_spare_groups_that_still_run_are_cancelled_when_the_batch_is_full():
    rolls = Rolls()
    stream = stream_of(rolls, spare=2)
    first = await ask(stream, 0)
    assert rolls.started == [0, 1, 2, 3]
    await rolls.finish(3)
    await rolls.finish(1)
    batch = await first
    assert (indices(batch), batch.aborted) == ([1, 3], 2)
    assert rolls.running == {}
    assert stream.open() == []
    await ask(stream, 1)
    assert sorted(rolls.running) == [4, 5, 6, 7]
    await stream.close()


async def test_spare_groups_go_on_into_the_next_batch_where_staleness_allows():
    rolls = Rolls()
    stream = stream_of(rolls, spare=1, max_staleness=1)
    first = await ask(stream, 0)
    for i in (0, 4):
        await rolls.finish(i)
    assert indices(await first) == [0, 4]
    assert sorted(rolls.running) == stream.open() == [1, 2, 3]
    await stream.close()


async def test_the_first_error_cancels_the_rest_and_is_raised_now_and_later():
    rolls = Rolls()
    stream = stream_of(rolls, max_staleness=1)
    first = await ask(stream, 0)
    await rolls.fail(2, OSError("no server"))
    with pytest.raises(OSError, match="no server"):
        await first
    assert rolls.running == {}
    assert stream.open() == [0, 1, 2, 3]
    with pytest.raises(OSError, match="no server"):
        await stream.next_batch(1)


async def test_an_error_while_the_learner_trains_ends_the_rest_at_once_and_is_raised_by_the_next_batch():
    rolls = Rolls()
    stream = stream_of(rolls, max_staleness=1)
    first = await ask(stream, 0)
    for i in (0, 1):
        await rolls.finish(i)
    await first
    await rolls.fail(3, OSError("no server"))
    assert rolls.running == {}
    with pytest.raises(OSError, match="no server"):
        await stream.next_batch(1)


async def test_an_error_of_has_spread_or_of_the_plan_is_not_lost():
    def broken_plan():
        yield from plan(2)
        raise KeyError("no such question")

    rolls = Rolls()
    stream = GroupStream(rolls, broken_plan(), batch=2, version=0, last=9, replacements=1, has_spread=rolls.has_spread)
    first = await ask(stream, 0)
    await rolls.finish(0, spread=False)
    with pytest.raises(KeyError, match="no such question"):
        await first

    stream = stream_of(rolls, replacements=1, has_spread=lambda group: 1 / 0)
    first = await ask(stream, 0)
    await rolls.finish(0)
    with pytest.raises(ZeroDivisionError):
        await first


async def test_the_plan_ends_with_a_smaller_batch_and_then_a_clear_error():
    rolls = Rolls()
    stream = stream_of(rolls, length=3, replacements=1)
    first = await ask(stream, 0)
    await rolls.finish(0)
    await rolls.finish(1)
    await first
    second = await ask(stream, 1)
    await rolls.finish(2, (1,), spread=False)
    assert indices(await second) == [2]
    with pytest.raises(RuntimeError, match=r"plan of groups has ended.*version 2"):
        await stream.next_batch(2)


async def test_closing_cancels_what_runs_and_leaves_it_open_for_a_resumed_run():
    rolls = Rolls()
    stream = stream_of(rolls, max_staleness=1)
    first = await ask(stream, 0)
    await rolls.finish(3)
    await rolls.finish(1)
    await first
    await rolls.finish(0)
    await stream.close()
    assert rolls.running == {}
    assert stream.open() == [0, 2]


async def test_a_cancelled_wait_loses_no_group():
    rolls = Rolls()
    stream = stream_of(rolls)
    first = await ask(stream, 0)
    await rolls.finish(0)
    first.cancel()
    await settle()
    assert stream.open() == [0, 1]
    assert list(rolls.running) == [1]
    await stream.close()


@pytest.mark.parametrize("name", ["batch", "max_staleness", "spare", "replacements"])
def test_settings_that_cannot_work_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got -1"):
        stream_of(Rolls(), **{name: -1})


async def test_versions_that_do_not_grow_and_groups_planned_twice_are_refused():
    rolls = Rolls()
    stream = stream_of(rolls, version=3)
    with pytest.raises(ValueError, match="versions must grow, up to 1000000, got 2 after 2"):
        await stream.next_batch(2)
    twice = GroupStream(rolls, iter([*plan(1), *plan(1)]), batch=2, version=0, last=9)
    with pytest.raises(ValueError, match="group 0 is planned twice"):
        await twice.next_batch(0)
    await twice.close()


settings_of_streams = st.fixed_dictionaries({
    "batch": st.integers(1, 4), "max_staleness": st.integers(0, 3), "spare": st.integers(0, 3),
    "replacements": st.integers(0, 3), "version": st.integers(0, 5),
})  # fmt: skip


@given(settings_of_streams, st.none() | st.integers(0, 25), st.data())
async def test_whatever_comes_when_none_is_too_old_used_twice_or_lost(settings, length, data):
    """Groups complete in any order, during the wait for a batch or the training after it, alike or not."""
    rolls = Rolls()
    stream = stream_of(rolls, length, **settings)
    born: dict[int, int] = {}
    used: list[int] = []
    given_up = 0
    first = settings["version"]

    async def finish_one(version: int) -> None:
        index = data.draw(st.sampled_from(sorted(rolls.running)))
        oldest = data.draw(st.integers(born[index], version))
        await rolls.finish(index, (version, oldest), data.draw(st.booleans()))
        see(version)

    def see(version: int) -> None:
        for index in rolls.started:
            born.setdefault(index, version)
        ahead = (version - first + 1 + settings["max_staleness"]) * settings["batch"] + settings["spare"]
        assert len(stream.open()) + len(used) <= ahead + settings["replacements"]
        assert len(set(rolls.started)) == len(rolls.started)
        assert set(rolls.running) <= set(stream.open()) <= set(rolls.started) - set(used)

    for version in range(first, first + 6):
        waiting = await ask(stream, version)
        see(version)
        while not waiting.done():
            await finish_one(version)
        if waiting.exception() is not None:
            assert "plan of groups has ended" in str(waiting.exception())
            assert len(rolls.started) == length
            break
        batch = waiting.result()
        assert indices(batch) == sorted(indices(batch))
        assert len(batch.groups) == settings["batch"] or len(rolls.started) == length
        assert max(batch.staleness) <= settings["max_staleness"]
        assert batch.without_spread <= settings["replacements"]
        assert batch.aborted == 0 or settings["max_staleness"] == 0 < settings["spare"]
        used += indices(batch)
        given_up += batch.stale + batch.without_spread + batch.aborted
        assert len(set(used)) == len(used)
        assert len(used) + given_up + len(stream.open()) == len(rolls.started)
        for _ in range(data.draw(st.integers(0, len(rolls.running)))):
            await finish_one(version)
    await stream.close()
    assert rolls.running == {}


@given(st.sets(st.integers(0, 9)), st.data())
async def test_strictly_on_policy_the_batch_does_not_depend_on_who_is_first(alike, data):
    batches = []
    for _ in range(2):
        rolls = Rolls()
        first = await ask(stream_of(rolls, batch=4, replacements=3), 0)
        while not first.done():
            index = data.draw(st.sampled_from(sorted(rolls.running)))
            await rolls.finish(index, spread=index not in alike)
        batches.append((indices(await first), sorted(rolls.started)))
    assert batches[0] == batches[1]
