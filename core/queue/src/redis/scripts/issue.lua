#!lua
-- KEYS inc tasks issued live cnt seen  ARGV inc task issued_bit seen_base group_size prompt payload
local size = tonumber(ARGV[5])
if redis.call('GETBIT', KEYS[3], ARGV[3]) == 0 then
  redis.call('SETBIT', KEYS[3], ARGV[3], 1)
  redis.call('HINCRBY', KEYS[5], 'issued', size)
end
local at = redis.call('HGET', KEYS[4], ARGV[2])
if at and entry_at(KEYS[2], at) then return 0 end
local missing = 0
for k = 0, size - 1 do
  if redis.call('GETBIT', KEYS[6], ARGV[4] + k) == 0 then missing = missing + 1 end
end
if missing == 0 then return 0 end
local id = redis.call('XADD', KEYS[2], '*', 't', ARGV[2], 'g', ARGV[5], 'p', ARGV[6], 'd', ARGV[7])
redis.call('HSET', KEYS[4], ARGV[2], id)
return 1
