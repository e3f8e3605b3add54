#!lua flags=allow-oom
-- KEYS wuse  ARGV actor e v
local now = redis.call('TIME')
return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. ARGV[3] .. ' ' .. now[1])
