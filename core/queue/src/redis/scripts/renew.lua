#!lua flags=allow-oom
-- The epoch is the fence: a lease that ran out with nobody taking over is simply taken again, and an epoch the
-- server has forgotten is restored. Epochs are unique, so the highest one that asks is the right one.
-- KEYS inc lease epoch  ARGV inc holder epoch ttl_ms
local mine, held = ARGV[2] .. ':' .. ARGV[3], redis.call('GET', KEYS[2])
local epoch, current = tonumber(ARGV[3]), tonumber(redis.call('GET', KEYS[3]) or '0')
if current > epoch or epoch == 0 or (current == epoch and held and held ~= mine) then
  return redis.error_reply('FENCED lease lost')
end
if current < epoch then redis.call('SET', KEYS[3], ARGV[3]) end
redis.call('SET', KEYS[2], mine, 'PX', ARGV[4])
return 1
