"""Join the calls of all processes that differ in M alone."""

from __future__ import annotations

from collections.abc import Iterable

from runner.kernels.call_template import NotGeneralError, Template, generalise
from runner.recording.events import ProcessRecord, RecordedCall
from runner.recording.recording import CallGroup, Seen


def group_calls(processes: Iterable[ProcessRecord]) -> list[CallGroup]:
    """Join the calls of all processes that differ in M alone, in order of first appearance."""
    calls = sorted((call for each in processes for call in each.calls), key=lambda c: c.started)
    groups: dict[object, CallGroup] = {}
    for call in calls:
        group = _group_of(call)
        key = group.title, group.num_sms
        if key in groups:
            groups[key].add(group)
        else:
            groups[key] = group
    return _joined(list(groups.values()))


def _group_of(call: RecordedCall) -> CallGroup:
    """The group of one call."""
    reason, m = "", None
    try:
        template, m = generalise(call.function, call.args, call.kwargs)
    except NotGeneralError as error:
        template = Template(call.function, call.args, call.kwargs)
        reason = str(error)
    return CallGroup(
        call=template,
        num_sms=call.num_sms,
        reason=reason,
        by=call.by,
        ranks=set() if call.rank is None else {call.rank},
        phases={call.phase: Seen({m or 0: call.count}, list(call.entries), call.seconds)},
        errors=[] if call.error is None else [call.error],
    )


def _joined(groups: list[CallGroup]) -> list[CallGroup]:
    """Join a group of one M into another one that gives the same call at that M.

    With one row, no stride shows whether it follows M; so the groups of few rows join last.
    """
    kept = [group for group in groups if len(group.ms) != 1]
    of_one = (group for group in groups if len(group.ms) == 1)
    for group in sorted(of_one, key=lambda group: group.ms, reverse=True):
        (m,) = group.ms
        sizes = group.call.at(m)
        same = (
            each
            for each in kept
            if (each.call.function, each.num_sms) == (group.call.function, group.num_sms)
            and each.ms
            and each.call.at(m) == sizes
        )
        into = next(same, None)
        if into is None:
            kept.append(group)
        else:
            into.add(group)
    order = {id(group): number for number, group in enumerate(groups)}
    return sorted(kept, key=lambda group: order[id(group)])
