#!lua flags=allow-oom
-- Live actors as {name, 'e v seconds'}; forgets the others. KEYS wuse  ARGV live_s
local now, all, out = tonumber(redis.call('TIME')[1]), redis.call('HGETALL', KEYS[1]), {}
for i = 1, #all, 2 do
  local since = tonumber(string.match(all[i + 1], '%d+$'))
  -- A time ahead of now is a clock that jumped back: the actor will say so again, or not.
  if since and now - since < tonumber(ARGV[1]) and since - now < tonumber(ARGV[1]) then
    out[#out + 1] = {all[i], all[i + 1]}
  else
    redis.call('HDEL', KEYS[1], all[i])
  end
end
return out
