#!lua flags=allow-oom
-- KEYS inc lease epoch  ARGV inc holder ttl_ms floor
local held, ttl = redis.call('GET', KEYS[2]), redis.call('PTTL', KEYS[2])
-- A lease without an end, or with an absurd one, is a jump of the server's clock: take over.
if held and ttl >= 0 and ttl <= 2 * tonumber(ARGV[3]) then return 0 end
local epoch = redis.call('INCR', KEYS[3])
if epoch <= tonumber(ARGV[4]) then
  epoch = tonumber(ARGV[4]) + 1
  redis.call('SET', KEYS[3], string.format('%d', epoch))
end
redis.call('SET', KEYS[2], ARGV[2] .. ':' .. string.format('%d', epoch), 'PX', ARGV[3])
return epoch
