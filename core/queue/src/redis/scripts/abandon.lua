#!lua flags=allow-oom
-- Ends a task whose missing samples will never come; each goes to the learner, as abandoned ('ab') or bad ('bad').
-- With an owner: only if the lease is the owner's and the entry is that task.
-- KEYS inc tasks live seen scored cnt dlq  ARGV inc id task seen_base field value reason owner rid…
local entry = entry_at(KEYS[2], ARGV[2])
if not entry then return 0 end
if ARGV[8] ~= '' then
  local pending = redis.call('XPENDING', KEYS[2], 'actors', ARGV[2], ARGV[2], 1)
  if #pending == 0 or pending[1][2] ~= ARGV[8] or fields(entry).t ~= ARGV[3] then return 0 end
end
local given_up = 0
for i = 9, #ARGV do
  if redis.call('SETBIT', KEYS[4], ARGV[4] + i - 9, 1) == 0 then
    redis.call('XADD', KEYS[5], '*', 'rid', ARGV[i], ARGV[5], ARGV[6], 'g', #ARGV - 8, 'why', ARGV[7])
    given_up = given_up + 1
  end
end
redis.call('HINCRBY', KEYS[6], 'delivered', given_up)
if ARGV[5] == 'ab' then redis.call('HINCRBY', KEYS[6], 'abandoned', given_up) end
redis.call('XADD', KEYS[7], 'MAXLEN', '~', '10000', '*', 'source', 'tasks', 'rid', ARGV[9] or '', 'reason', ARGV[7])
redis.call('XACK', KEYS[2], 'actors', ARGV[2])
redis.call('XDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[3])
return given_up
