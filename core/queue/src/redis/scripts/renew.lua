#!lua flags=allow-oom
-- The epoch is the fence: a lease that ran out with nobody taking over is simply taken again.
-- KEYS inc lease epoch  ARGV inc holder epoch ttl_ms
local mine, held = ARGV[2] .. ':' .. ARGV[3], redis.call('GET', KEYS[2])
if redis.call('GET', KEYS[3]) ~= ARGV[3] or (held and held ~= mine) then
  return redis.error_reply('FENCED lease lost')
end
redis.call('SET', KEYS[2], mine, 'PX', ARGV[4])
return 1
