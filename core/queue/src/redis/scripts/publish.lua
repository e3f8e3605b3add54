#!lua flags=allow-oom
-- The flip. Readers see a version only after this, with every piece in place and without an expiry.
-- KEYS epoch wcur wm wver wann piece…  ARGV epoch e v manifest nonce listing
local fence = redis.call('GET', KEYS[1])
if not fence or tonumber(fence) < tonumber(ARGV[1]) then return redis.error_reply('DATALOST epoch is gone') end
if fence ~= ARGV[1] then return redis.error_reply('FENCED publish refused') end
local current = redis.call('HMGET', KEYS[2], 'e', 'v')
local ce, cv, e, v = tonumber(current[1] or '-1'), tonumber(current[2] or '-1'), tonumber(ARGV[2]), tonumber(ARGV[3])
if e == ce and v == cv and redis.call('HGET', KEYS[3], 'manifest') == ARGV[4] then return 'OK' end
if e < ce or (e == ce and v <= cv) then return redis.error_reply('STALE not newer') end
for i = 6, #KEYS do
  if redis.call('PERSIST', KEYS[i]) == 0 and redis.call('EXISTS', KEYS[i]) == 0 then
    return redis.error_reply('INCOMPLETE a piece has expired')
  end
end
redis.call('HSET', KEYS[3], 'manifest', ARGV[4], 'nonce', ARGV[5])
redis.call('RPUSH', KEYS[4], ARGV[6])
redis.call('HSET', KEYS[2], 'e', ARGV[2], 'v', ARGV[3])
redis.call('XADD', KEYS[5], 'MAXLEN', '~', '1000', '*', 'e', ARGV[2], 'v', ARGV[3])
return 'OK'
