"""The scripts by which a worker writes to Redis. Each is one atomic step.

Invariants that they keep, and readers rely on:

- Only the lease's generation writes: every script but `REGISTER` first compares
  the lease with its own generation and otherwise changes nothing, so that a
  process that was thought dead can't write over its successor.
- Generations grow: `REGISTER` refuses one that is not above the lease's.
- `owned` and `seq` change together, and the event with that number is in the
  stream by the same step.
- `PUBLISH` applies a number once: a repeat after a timeout changes nothing and
  succeeds. A number that is not the next is refused.
- Every key has a TTL that ends with the lease's; the stream's is the longest of
  its workers'.

All keys carry one hash tag. Generations are compared as text: they exceed what a
Lua number holds.
"""

from __future__ import annotations

#: Entries that the stream of events keeps, about.
MAX_EVENTS = 4096

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

#: KEYS lease, card, owned, seq, workers, events, the former generation's owned and seq.
#: ARGV id, generation, ttl_ms, card, owned, max events, then the event's fields.
#: Returns "", or the lease's generation if it is not below ours.
REGISTER = (
    _NOW
    + """
local held = redis.call('GET', KEYS[1])
if held and (#held > #ARGV[2] or (#held == #ARGV[2] and held >= ARGV[2])) then
  return held
end
redis.call('DEL', KEYS[7], KEYS[8])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('SET', KEYS[2], ARGV[4], 'PX', ARGV[3])
redis.call('SET', KEYS[3], ARGV[5], 'PX', ARGV[3])
redis.call('SET', KEYS[4], 0, 'PX', ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now)
redis.call('ZADD', KEYS[5], now + ARGV[3], ARGV[1])
redis.call('PEXPIRE', KEYS[5], ARGV[3])
redis.call('XADD', KEYS[6], 'MAXLEN', '~', ARGV[6], '*', unpack(ARGV, 7))
redis.call('PEXPIRE', KEYS[6], ARGV[3])
return ''
"""
)

#: KEYS lease, card, owned, seq, workers, events. ARGV id, generation, ttl_ms.
#: Returns 1, or 0 if the lease or one of our keys is gone.
RENEW = (
    _NOW
    + """
if redis.call('GET', KEYS[1]) ~= ARGV[2] then
  return 0
end
for i = 1, 4 do
  if redis.call('PEXPIRE', KEYS[i], ARGV[3]) == 0 then
    return 0
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now)
redis.call('ZADD', KEYS[5], now + ARGV[3], ARGV[1])
redis.call('PEXPIRE', KEYS[5], ARGV[3])
redis.call('PEXPIRE', KEYS[6], ARGV[3])
return 1
"""
)

#: KEYS lease, owned, seq, events.
#: ARGV generation, sequence, ttl_ms, max events, number of writes, then offset and
#: bytes of each write, then the event's fields.
#: Returns 1, or 0 if the lease or the sequence is not ours.
PUBLISH = """
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
local fields = 6 + 2 * ARGV[5]
for i = 6, fields - 1, 2 do
  redis.call('SETRANGE', KEYS[2], ARGV[i], ARGV[i + 1])
end
redis.call('INCR', KEYS[3])
redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[4], '*', unpack(ARGV, fields))
redis.call('PEXPIRE', KEYS[4], ARGV[3])
return 1
"""

#: KEYS lease, card, owned, seq, workers, events.
#: ARGV id, generation, ttl_ms, max events, then the event's fields.
#: Returns 1, or 0 if the lease is not ours (any more).
LEAVE = """
if redis.call('GET', KEYS[1]) ~= ARGV[2] then
  return 0
end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
redis.call('ZREM', KEYS[5], ARGV[1])
redis.call('XADD', KEYS[6], 'MAXLEN', '~', ARGV[4], '*', unpack(ARGV, 5))
redis.call('PEXPIRE', KEYS[6], ARGV[3])
return 1
"""
