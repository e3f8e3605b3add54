#!lua flags=no-writes
-- KEYS inc seen  ARGV inc base group_size
local out = {}
for k = 0, ARGV[3] - 1 do out[k + 1] = redis.call('GETBIT', KEYS[2], ARGV[2] + k) end
return out
