#!lua flags=allow-oom
-- KEYS inc prog epoch  ARGV inc epoch version
local refused = fence(KEYS[3], ARGV[2])
if refused then return refused end
return redis.call('SET', KEYS[2], ARGV[3])
