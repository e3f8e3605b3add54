#!lua
-- No allow-oom: a full server must refuse.
-- KEYS inc stream seen bytes cnt  ARGV inc bit max_len max_bytes rid payload
if redis.call('GETBIT', KEYS[3], ARGV[2]) == 1 then return 'DUP' end
local used = tonumber(redis.call('GET', KEYS[4]) or '0')
if redis.call('XLEN', KEYS[2]) >= tonumber(ARGV[3]) or used + #ARGV[6] > tonumber(ARGV[4]) then return 'BUSY' end
redis.call('SETBIT', KEYS[3], ARGV[2], 1)
redis.call('INCRBY', KEYS[4], #ARGV[6])
redis.call('HINCRBY', KEYS[5], 'delivered', 1)
redis.call('XADD', KEYS[2], '*', 'rid', ARGV[5], 'd', ARGV[6])
return 'OK'
