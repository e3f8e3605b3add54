#!lua flags=allow-oom
-- Gives {first missing sample or -1, group size}. KEYS inc tasks live seen  ARGV inc id task seen_base
local entry = entry_at(KEYS[2], ARGV[2])
if not entry then return {-1, 0} end
local task = fields(entry)
if task.t ~= ARGV[3] then return {-1, 0} end
for k = 0, task.g - 1 do
  if redis.call('GETBIT', KEYS[4], ARGV[4] + k) == 0 then return {k, tonumber(task.g)} end
end
redis.call('XACK', KEYS[2], 'actors', ARGV[2])
redis.call('XDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[3])
return {-1, tonumber(task.g)}
