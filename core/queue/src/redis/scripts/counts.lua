#!lua flags=no-writes
-- KEYS inc cnt rollouts scored tasks bytes  ARGV inc
local counters = redis.call('HMGET', KEYS[2], 'issued', 'delivered', 'acked', 'abandoned')
local out = {}
for i = 1, 4 do out[i] = tonumber(counters[i] or '0') end
for i = 3, 5 do out[i + 2] = redis.call('XLEN', KEYS[i]) end
out[8] = tonumber(redis.call('GET', KEYS[6]) or '0')
return out
