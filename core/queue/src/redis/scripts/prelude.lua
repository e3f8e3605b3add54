if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('DATALOST incarnation changed') end
local function fields(entry)
  local map = {}
  for i = 1, #entry[2], 2 do map[entry[2][i]] = entry[2][i + 1] end
  return map
end
local function entry_at(stream, id)
  return redis.call('XRANGE', stream, id, id)[1]
end
