#!lua flags=allow-oom
-- Renews only for the owner; JUSTID leaves the delivery counter alone. KEYS inc stream  ARGV inc group consumer id
local pending = redis.call('XPENDING', KEYS[2], ARGV[2], ARGV[4], ARGV[4], 1)
if #pending == 0 or pending[1][2] ~= ARGV[3] then return 0 end
redis.call('XCLAIM', KEYS[2], ARGV[2], ARGV[3], '0', ARGV[4], 'JUSTID')
return 1
