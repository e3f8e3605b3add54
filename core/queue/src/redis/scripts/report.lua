#!lua
-- KEYS inc outcomes epoch  ARGV inc epoch payload
if redis.call('GET', KEYS[3]) ~= ARGV[2] then return redis.error_reply('FENCED report refused') end
return redis.call('XADD', KEYS[2], '*', 'o', ARGV[3])
