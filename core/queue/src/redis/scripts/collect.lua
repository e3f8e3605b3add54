#!lua flags=allow-oom
-- Forgets one published version. KEYS wm wver piece…  ARGV listing
redis.call('LREM', KEYS[2], 0, ARGV[1])
redis.call('UNLINK', KEYS[1])
for i = 3, #KEYS do redis.call('UNLINK', KEYS[i]) end
return 1
