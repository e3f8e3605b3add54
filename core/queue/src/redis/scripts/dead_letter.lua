#!lua flags=allow-oom
-- KEYS inc dlq  ARGV inc source rid reason
return redis.call('XADD', KEYS[2], 'MAXLEN', '~', '10000', '*', 'source', ARGV[2], 'rid', ARGV[3], 'reason', ARGV[4])
