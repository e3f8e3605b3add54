#!lua flags=allow-oom
-- KEYS inc key  ARGV inc value
return redis.call('SET', KEYS[2], ARGV[2])
