if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('DATALOST incarnation changed') end
local function fields(entry)
  local map = {}
  for i = 1, #entry[2], 2 do map[entry[2][i]] = entry[2][i + 1] end
  return map
end
-- An epoch that is missing or older than the caller's is data that were lost; the learner's next renewal heals it.
local function fence(key, epoch)
  local current = redis.call('GET', key)
  if epoch ~= '0' and (not current or tonumber(current) < tonumber(epoch)) then
    return redis.error_reply('DATALOST epoch is gone')
  end
  if current ~= epoch then return redis.error_reply('FENCED epoch is over') end
end
local function entry_at(stream, id)
  return redis.call('XRANGE', stream, id, id)[1]
end
