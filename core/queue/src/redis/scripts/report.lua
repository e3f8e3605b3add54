#!lua
-- KEYS inc outcomes epoch  ARGV inc epoch payload
local refused = fence(KEYS[3], ARGV[2])
if refused then return refused end
return redis.call('XADD', KEYS[2], '*', 'o', ARGV[3])
