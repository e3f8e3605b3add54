#!lua flags=no-writes
-- KEYS inc key  ARGV inc
return redis.call('GET', KEYS[2])
