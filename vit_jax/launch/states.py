"""What becomes of a job in the cloud, and what the cloud's errors mean."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, slots=True)
class State:
  """`kind`: waiting, active, lost (taken away, or never given), done, failed (by itself)."""

  kind: str
  word: str  # The cloud's own.
  why: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class Trouble:
  """What an error message is about, whether trying again can help, and what to do."""

  what: str
  again: bool
  remedy: str


# The first pattern that an error contains says what it is.
TROUBLES = {
  r'active account|[Rr]eauthenticat|invalid_grant|UNAUTHENTICATED':
    Trouble('gcloud is not logged in', False, '`gcloud auth login`, or a service account on this machine'),
  r'SERVICE_DISABLED|has not been used in project|it is disabled':
    Trouble('the TPU API is not enabled', False, '`gcloud services enable tpu.googleapis.com storage.googleapis.com`'),
  r'PERMISSION_DENIED|does not have permission|[Pp]ermission .* denied|Forbidden|HTTPError 403':
    Trouble('permission denied', False, 'the account needs roles/tpu.admin, roles/iam.serviceAccountUser and '
            'roles/storage.objectAdmin in the project; `gcloud config list` says which account and project these are'),
  r'[Qq]uota':
    Trouble('over the quota', False, 'ask for more in the console under IAM > Quotas (spot and on-demand are counted apart), '
            'or take fewer chips'),
  r'no more capacity|[Ss]tock-?out|ZONE_RESOURCE_POOL_EXHAUSTED|RESOURCE_EXHAUSTED|not enough .*(capacity|resources)':
    Trouble('the zone has none left', True, 'another --zone, a smaller --tpu or a reservation may be had sooner'),
  r'ALREADY_EXISTS|already exists':
    Trouble('the name is taken', False, '`launch watch NAME` goes on with it, `launch delete NAME` removes it'),
  r'not found in zone|Invalid accelerator|is not (available|supported) in|not available in zone':
    Trouble('the zone has no such TPU', False, '`gcloud compute tpus accelerator-types list --zone=ZONE` lists what it has'),
  r'UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|HTTPError 5\d\d|[Cc]onnection|timed out':
    Trouble('the cloud does not answer', True, 'nothing to do but wait'),
}  # fmt: skip
GONE = re.compile(r'NOT_FOUND|[Nn]ot ?[Ff]ound')


def trouble(message: str) -> Trouble | None:
  """What an error message of gcloud, xpk or kubectl is about, where it is known."""
  return next((found for pattern, found in TROUBLES.items() if re.search(pattern, message)), None)
