#!lua flags=allow-oom
-- Moves an entry from rollouts to scored in another form; idempotent. allow-oom: it frees what it adds.
-- Who leased the entry must name its rollout; what replaces a damaged one names it anew. KEYS inc rollouts scored bytes
-- ARGV inc id rid field value leased
local entry = entry_at(KEYS[2], ARGV[2])
if not entry then return 0 end
local old = fields(entry)
if ARGV[6] == '1' and (old.rid or '') ~= ARGV[3] then return redis.error_reply('MISMATCH wrong lease') end
redis.call('XADD', KEYS[3], '*', 'rid', ARGV[3], ARGV[4], ARGV[5])
redis.call('XACK', KEYS[2], 'reward', ARGV[2])
redis.call('XDEL', KEYS[2], ARGV[2])
redis.call('INCRBY', KEYS[4], (ARGV[4] == 'd' and #ARGV[5] or 0) - #(old.d or ''))
return 1
