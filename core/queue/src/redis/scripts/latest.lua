#!lua flags=no-writes
-- KEYS wcur ctl epoch
local current = redis.call('HMGET', KEYS[1], 'e', 'v')
return {current[1] or '', current[2] or '', redis.call('GET', KEYS[2]) or 'run', redis.call('GET', KEYS[3]) or ''}
