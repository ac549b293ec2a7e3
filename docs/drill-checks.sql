-- What the bank of the sample report has to be like after a restore: see drill.md.

-- name: accounts are all there
-- expect: 1000
SELECT count(*) FROM accounts;

-- name: payments are there
-- expect: > 50000
SELECT count(*) FROM payments;

-- name: the books balance
-- expect: true
SELECT sum(balance) = 1000 * count(*) FROM accounts;

-- name: each payment is between accounts that exist
-- expect: 0
-- timeout: 60
SELECT count(*)
FROM payments
WHERE payer NOT IN (SELECT id FROM accounts)
   OR payee NOT IN (SELECT id FROM accounts);

-- name: payments can be made
INSERT INTO payments (payer, payee, amount, memo) VALUES (1, 2, 10, 'a drill');
