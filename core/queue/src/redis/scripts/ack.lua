#!lua flags=allow-oom
-- Idempotent: a second call frees and counts nothing. KEYS inc scored epoch bytes cnt  ARGV inc epoch id…
local refused = fence(KEYS[3], ARGV[2])
if refused then return refused end
local freed, acked = 0, 0
for i = 3, #ARGV do
  local entry = entry_at(KEYS[2], ARGV[i])
  if entry then
    local payload = fields(entry).d
    if payload then freed = freed + #payload end
    acked = acked + 1
  end
  redis.call('XACK', KEYS[2], 'learner', ARGV[i])
  redis.call('XDEL', KEYS[2], ARGV[i])
end
if freed > 0 then redis.call('DECRBY', KEYS[4], freed) end
if acked > 0 then redis.call('HINCRBY', KEYS[5], 'acked', acked) end
return acked
