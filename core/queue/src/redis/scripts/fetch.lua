#!lua flags=allow-oom
-- What older learners left unacknowledged first, then new entries.
-- KEYS inc scored epoch ctl  ARGV inc epoch consumer max cursor         cursor '' = nothing is left behind
local refused = fence(KEYS[3], ARGV[2])
if refused then return refused end
local out, cursor, max = {}, ARGV[5], tonumber(ARGV[4])
if cursor ~= '' and max > 0 then
  -- Older consumers are fenced, so any idle time will do.
  local claimed = redis.call('XAUTOCLAIM', KEYS[2], 'learner', ARGV[3], 0, cursor, 'COUNT', max)
  cursor, out = claimed[1], claimed[2]
  if cursor == '0-0' then
    cursor = ''
    for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[2], 'learner')) do
      local consumer = fields({'', info})
      if consumer.name ~= ARGV[3] and consumer.pending == 0 then
        redis.call('XGROUP', 'DELCONSUMER', KEYS[2], 'learner', consumer.name)
      end
    end
  end
end
if cursor == '' and #out < max then
  local read = redis.call('XREADGROUP', 'GROUP', 'learner', ARGV[3], 'COUNT', max - #out, 'STREAMS', KEYS[2], '>')
  if read then
    for _, entry in ipairs(read[1][2]) do out[#out + 1] = entry end
  end
end
return {cursor, redis.call('GET', KEYS[4]) or 'run', out}
