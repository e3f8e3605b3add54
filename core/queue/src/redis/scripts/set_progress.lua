#!lua flags=allow-oom
-- KEYS inc prog epoch  ARGV inc epoch version
if redis.call('GET', KEYS[3]) ~= ARGV[2] then return redis.error_reply('FENCED progress refused') end
return redis.call('SET', KEYS[2], ARGV[3])
