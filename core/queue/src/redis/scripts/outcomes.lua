#!lua flags=allow-oom
-- Ends what the last call gave, then gives what was never confirmed, then what is new.
-- KEYS inc outcomes ctl  ARGV inc max id…
for i = 3, #ARGV do
  redis.call('XACK', KEYS[2], 'pool', ARGV[i])
  redis.call('XDEL', KEYS[2], ARGV[i])
end
local out, max = {}, tonumber(ARGV[2])
for _, from in ipairs({'0', '>'}) do
  if #out < max then
    local read = redis.call('XREADGROUP', 'GROUP', 'pool', 'pool', 'COUNT', max - #out, 'STREAMS', KEYS[2], from)
    for _, entry in ipairs(read and read[1][2] or {}) do
      if entry[2] then
        out[#out + 1] = {entry[1], entry[2][2]}
      else
        redis.call('XACK', KEYS[2], 'pool', entry[1])
      end
    end
  end
end
return {redis.call('GET', KEYS[3]) or 'run', out}
