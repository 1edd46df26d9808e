"""The scripts by which a worker writes to Redis. Each is one atomic step.

Invariants that they keep, and readers rely on:

- Only the lease's generation writes: every script but `REGISTER` first compares
  the lease with its own generation and otherwise changes nothing, so that a
  process that was thought dead can't write over its successor.
- Generations grow: `REGISTER` refuses one that is not above the lease's.
- `owned` and `seq` change together, and the event with that number is in the
  stream by the same step.
- `PUBLISH` applies a number once: a repeat after a timeout changes nothing and
  succeeds. A number that is not the next is refused, as is a `RENEW` of a worker
  whose `seq` is not what it has published: Redis was restored from an older state,
  or a replica that lacked the last writes was promoted.
- Every key has a TTL that ends with the lease's; the stream's is the longest of
  its workers'. The stream keeps what a reader may need that looks at all
  sequences once a second: `EVENTS_KEPT_MS`, and `MAX_EVENTS` at most.
- When Redis is full, `PUBLISH` and `REGISTER` are refused before they wrote
  anything; `RENEW` and `LEAVE` go through, so that a full Redis removes nobody.

All keys carry one hash tag. Generations are compared as text: they exceed what a
Lua number holds. Only what Redis 6.2 has is used.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from redis.exceptions import NoScriptError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio import Redis

#: Entries that the stream of events keeps at most, about.
MAX_EVENTS = 65536
#: How long the stream keeps an event, about.
EVENTS_KEPT_MS = 4000


class Script:
    """A script that a server is sent once and then called by its hash."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def run(
        self, redis: Redis, keys: Sequence[str], args: Sequence[str | bytes | int]
    ) -> bytes | int:
        """What it returns. Raises redis-py's errors."""
        try:
            answer = await redis.evalsha(self._sha, len(keys), *keys, *args)
        except NoScriptError:
            # EVAL keeps it too: no right to load scripts is needed, and no other server asked.
            answer = await redis.eval(self._text, len(keys), *keys, *args)
        result: bytes | int = answer
        return result


_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

#: What workers share lives as long as the longest of their leases.
_ADD_EVENT = f"""
local function add_event(key, ttl, first)
  redis.call('XADD', key, 'MAXLEN', '~', {MAX_EVENTS}, '*', unpack(ARGV, first))
  redis.call('XTRIM', key, 'MINID', '~', string.format('%.0f', now - {EVENTS_KEPT_MS}))
  if redis.call('PTTL', key) < tonumber(ttl) then
    redis.call('PEXPIRE', key, ttl)
  end
end
local function list_worker(key, ttl, id)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  redis.call('ZADD', key, now + ttl, id)
  if redis.call('PTTL', key) < tonumber(ttl) then
    redis.call('PEXPIRE', key, ttl)
  end
end
"""

#: KEYS lease, card, workers, events, seq, the former generation's seq, then owned of each
#: tier, then the former generation's owned of each tier.
#: ARGV id, generation, ttl_ms, card, number of tiers, owned of each tier, the event's fields.
#: Returns "", or the lease's generation if it is not below ours.
REGISTER = Script(
    _NOW
    + _ADD_EVENT
    + """
local held = redis.call('GET', KEYS[1])
if held and (#held > #ARGV[2] or (#held == #ARGV[2] and held >= ARGV[2])) then
  return held
end
local ttl, tiers = ARGV[3], tonumber(ARGV[5])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ttl)
redis.call('SET', KEYS[2], ARGV[4], 'PX', ttl)
redis.call('SET', KEYS[5], 0, 'PX', ttl)
redis.call('DEL', KEYS[6])
for i = 1, tiers do
  redis.call('DEL', KEYS[6 + tiers + i])
  redis.call('SET', KEYS[6 + i], ARGV[5 + i], 'PX', ttl)
end
list_worker(KEYS[3], ttl, ARGV[1])
add_event(KEYS[4], ttl, 6 + tiers)
return ''
"""
)

#: KEYS lease, card, workers, events, seq, then owned of each tier.
#: ARGV id, generation, ttl_ms, the sequence before that of an event whose fate is not
#: known, the sequence after it, card.
#: Returns 1, or 0 if the lease or one of our keys is not ours as it should be.
RENEW = Script(
    _NOW
    + _ADD_EVENT
    + """
if redis.call('GET', KEYS[1]) ~= ARGV[2] then
  return 0
end
local known = redis.call('GET', KEYS[5])
if known ~= ARGV[4] and known ~= ARGV[5] then
  return 0
end
for i = 5, #KEYS do
  if redis.call('PEXPIRE', KEYS[i], ARGV[3]) == 0 then
    return 0
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SET', KEYS[2], ARGV[6], 'PX', ARGV[3])
if redis.call('PTTL', KEYS[4]) < tonumber(ARGV[3]) then
  redis.call('PEXPIRE', KEYS[4], ARGV[3])
end
list_worker(KEYS[3], ARGV[3], ARGV[1])
return 1
"""
)

#: KEYS lease, owned of the event's tier, seq, events.
#: ARGV generation, sequence, ttl_ms, number of writes, then offset and bytes of each
#: write, then the event's fields.
#: Returns 1, or 0 if the lease or the sequence is not ours.
PUBLISH = Script(
    _NOW
    + _ADD_EVENT
    + """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
local known = redis.call('GET', KEYS[3])
if known == ARGV[2] then
  return 1
end
if not known or tonumber(known) + 1 ~= tonumber(ARGV[2]) then
  return 0
end
local fields = 5 + 2 * ARGV[4]
for i = 5, fields - 1, 2 do
  redis.call('SETRANGE', KEYS[2], ARGV[i], ARGV[i + 1])
end
redis.call('INCR', KEYS[3])
add_event(KEYS[4], ARGV[3], fields)
return 1
"""
)

#: KEYS lease, card, workers, events, seq, then owned of each tier.
#: ARGV id, generation, ttl_ms, then the event's fields.
#: Returns 1, or 0 if the lease is not ours (any more).
LEAVE = Script(
    _NOW
    + _ADD_EVENT
    + """
if redis.call('GET', KEYS[1]) ~= ARGV[2] then
  return 0
end
redis.call('DEL', KEYS[1], KEYS[2], unpack(KEYS, 5))
redis.call('ZREM', KEYS[3], ARGV[1])
add_event(KEYS[4], ARGV[3], 4)
return 1
"""
)
