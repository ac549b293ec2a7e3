"""What S3 servers and the way to them answer, in words: what is the matter, what to do, and whether it may pass.

Codes are from "Error responses" in the Amazon S3 API reference, and from what look-alikes were seen to answer.
"""

from __future__ import annotations

import asyncio
import re

import aiohttp
from botocore import exceptions as boto

from pipeline.errors import ObjectConflict, ObjectMissing, StoreError

_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or their _FILE twins)"
_RIGHTS = (
    "allow these credentials s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket;"
    " without s3:ListBucket a missing object looks forbidden, too. To see a bucket as it was, also"
    " s3:GetBucketVersioning, s3:ListBucketVersions and s3:GetObjectVersion"
)
_BETWEEN = "if it happens again, check the network and what is between this host and the store (proxy, firewall)"
_CLOCK = "the clocks of this host and of the store differ by more than 15 minutes: set them"

#: aiohttp tells in "Cannot connect to host …" what it was to use for TLS, and does so for http://, too.
_TLS_ARGUMENT = re.compile(r" ssl:(?:<[^>]*>|\S+) \[")

#: Error codes that never pass by themselves → (what it means, hint).
_PERMANENT = {
    "NoSuchBucket": ("there is no such bucket", "create the bucket, or correct the destination"),
    "InvalidBucketName": ("that is no name of a bucket", "correct the destination"),
    "AccessDenied": ("access is denied", _RIGHTS),
    "AllAccessDisabled": ("the bucket is disabled", "ask whoever runs the store"),
    "AccountProblem": ("there is a problem with the account", "ask whoever runs the store"),
    "InvalidAccessKeyId": ("it does not know this access key", _CREDENTIALS),
    "SignatureDoesNotMatch": ("the secret key does not match the access key", _CREDENTIALS),
    "InvalidToken": ("the session token is not valid", "renew AWS_SESSION_TOKEN"),
    "ExpiredToken": ("the session token has expired", "renew AWS_SESSION_TOKEN"),
    "RequestTimeTooSkewed": ("the request's time is refused", _CLOCK),
    "PermanentRedirect": ("the bucket is in another region", "give the destination its region=…"),
    "AuthorizationHeaderMalformed": ("the region is refused", "give the destination its region=…"),
    "IllegalLocationConstraintException": ("the region is refused", "give the destination its region=…"),
    "EntityTooLarge": (
        "it takes no object of that size",
        "raise the store's limit for one PUT, or use smaller segments",
    ),
    "InvalidStorageClass": ("it has no such storage class", "correct storage_class=… of the destination"),
    "InvalidObjectState": ("the object is archived", "restore it from the archive tier first, then try again"),
    "KMS.NotFoundException": ("there is no such KMS key", "correct kms_key=… of the destination"),
    "KMS.DisabledException": ("the KMS key is disabled", "enable the key"),
    "ObjectLockConfigurationNotFoundError": ("the bucket has no object lock", "create a bucket with object lock"),
    "QuotaExceeded": ("the quota is used up", "raise the quota, or expire backups"),
    "XMinioStorageFull": ("the store's disks are full", "make room there, or expire backups"),
}
#: Error codes that say "try again", whatever the status.
_PASSING = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "ServiceUnavailable",
    "InternalError", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "BadDigest", "IncompleteBody",
}  # fmt: skip


def refused(store: str, endpoint: str, what: str, error: boto.ClientError) -> StoreError:
    """The error for an answer of the server that is none of success. ``what``: the operation and its key."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    message = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())[:200]
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    place = f"{store} at {endpoint}: {what}"
    if code in _PERMANENT:
        meaning, hint = _PERMANENT[code]
        return StoreError(f"{place}: {meaning} ({code})", hint=hint)
    if status == 403:
        return StoreError(f"{place}: access is denied ({code or status})", hint=_RIGHTS)
    passing = code in _PASSING or status >= 500 or status in {408, 425, 429} or status == 200
    hint = ""
    if code in {"SlowDown", "TooManyRequests"} or status in {429, 503}:
        hint = "the store asks to be asked less often, or is not ready"
    elif code == "InvalidRequest" and ("lock" in message.lower() or "kept until" in what):
        hint = "object lock must be enabled for the bucket when it is created"
    elif status == 400 and not passing:
        hint = (
            "some stores refuse newer checksums or options: see checksums=, sse= and storage_class= of the destination"
        )
    said = f"{code}: {message}" if message else code
    return StoreError(f"{place}: answered {status} {said}", hint=hint, passing=passing)


def unreachable(store: str, endpoint: str, what: str, error: BaseException) -> StoreError:
    """The error for a request that got no whole answer, or could not be made."""
    place = f"{store} at {endpoint}: {what}"
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return StoreError(f"{place}: there are no credentials", hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(_inner(error), FileNotFoundError | PermissionError):
        return StoreError(
            f"{place}: certificates cannot be read: {_cause(error)}", hint="see ca=FILE, or AWS_CA_BUNDLE"
        )
    if isinstance(error, boto.SSLError | aiohttp.ClientSSLError):
        return StoreError(
            f"{place}: TLS failed: {_cause(error)}",
            hint="give the certificate of the store's authority as ca=FILE in the destination, or in AWS_CA_BUNDLE",
        )
    if isinstance(error, boto.ProxyConnectionError):
        hint = "check HTTP_PROXY, HTTPS_PROXY and NO_PROXY"
        return StoreError(f"{place}: the proxy cannot be reached: {_cause(error)}", hint=hint, passing=True)
    if isinstance(error, boto.EndpointConnectionError | boto.ConnectTimeoutError):
        return StoreError(
            f"{place}: the store cannot be reached: {_cause(error)}",
            hint="check endpoint=… of the destination, the network, and that the store runs",
            passing=True,
        )
    if isinstance(error, boto.ReadTimeoutError | asyncio.TimeoutError):
        return StoreError(f"{place}: the store stopped answering", hint="it is overloaded or hangs", passing=True)
    if isinstance(error, boto.HTTPClientError | boto.ResponseStreamingError | aiohttp.ClientError | OSError):
        return StoreError(f"{place}: the connection broke: {_cause(error)}", hint=_BETWEEN, passing=True)
    if isinstance(error, boto.FlexibleChecksumError):
        return StoreError(f"{place}: damaged on the way: {_cause(error)}", hint=_BETWEEN, passing=True)
    return StoreError(f"{place}: {_cause(error)}", hint="check the options of the destination")


def missing(store: str, key: str) -> ObjectMissing:
    return ObjectMissing(f"{key} is missing from {store}")


def conflict(store: str, key: str) -> ObjectConflict:
    return ObjectConflict(f"{store} has an object {key} already")


def _inner(error: BaseException) -> BaseException:
    """What a client's error was made of: the outer ones only repeat the address."""
    inner = getattr(error, "kwargs", {}).get("error")
    return inner if isinstance(inner, BaseException) else error


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    inner = _inner(error)
    return _TLS_ARGUMENT.sub(" [", " ".join(str(inner).split()) or type(inner).__name__)[:200]
