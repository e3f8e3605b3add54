#!lua flags=allow-oom
-- Abandoned entries first, then new ones. Cannot block, so the caller polls.
-- KEYS inc stream ctl  ARGV inc group consumer max lease_ms reap      reap 1 = look for abandoned ones
local out, cursor, max = {}, '0-0', tonumber(ARGV[4])
while ARGV[6] == '1' and cursor and #out < max do
  local claimed =
    redis.call('XAUTOCLAIM', KEYS[2], ARGV[2], ARGV[3], ARGV[5], cursor, 'COUNT', max - #out)
  for _, entry in ipairs(claimed[2]) do
    local pending = redis.call('XPENDING', KEYS[2], ARGV[2], entry[1], entry[1], 1)
    out[#out + 1] = {entry[1], pending[1][4], entry[2]}
  end
  cursor = claimed[1] ~= '0-0' and claimed[1]
end
if #out < max then
  local read = redis.call('XREADGROUP', 'GROUP', ARGV[2], ARGV[3], 'COUNT', max - #out, 'STREAMS', KEYS[2], '>')
  if read then
    for _, entry in ipairs(read[1][2]) do out[#out + 1] = {entry[1], 1, entry[2]} end
  end
end
return {redis.call('GET', KEYS[3]) or 'run', out}
