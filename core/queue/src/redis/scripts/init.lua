#!lua
-- Creates what is missing and gives the incarnation. KEYS inc tasks rollouts scored outcomes  ARGV candidate
redis.call('SET', KEYS[1], ARGV[1], 'NX')
local groups = {'actors', 'reward', 'learner', 'pool'}
for i, group in ipairs(groups) do
  redis.pcall('XGROUP', 'CREATE', KEYS[i + 1], group, '0', 'MKSTREAM')
end
return redis.call('GET', KEYS[1])
