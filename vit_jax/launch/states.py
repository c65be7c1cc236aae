"""States of a job in the cloud, and what error messages of the cloud mean."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, slots=True)
class JobState:
  """The state of a job.

  `kind` is waiting, active, lost (preempted, or never created), done, or failed by its own fault.
  """

  kind: str
  cloud_state: str  # As the cloud spells it.
  reason: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class CloudProblem:
  """The cause of an error message, whether a retry can help, and the remedy."""

  summary: str
  retry: bool
  remedy: str


# The first pattern that matches decides.
CLOUD_PROBLEMS = {
  r'active account|[Rr]eauthenticat|invalid_grant|UNAUTHENTICATED':
    CloudProblem('gcloud is not logged '
                 'in', False, '`gcloud auth login`, or a service account on this machine'),
  r'SERVICE_DISABLED|has not been used in project|it is disabled':
    CloudProblem('the TPU API is not '
                 'enabled', False, '`gcloud services enable tpu.googleapis.com '
                                   'storage.googleapis.com`'),
  r'PERMISSION_DENIED|does not have permission|[Pp]ermission .* denied|Forbidden|HTTPError 403':
    CloudProblem('permission '
                 'denied', False, 'the account needs roles/tpu.admin, '
                                  'roles/iam.serviceAccountUser and '
            'roles/storage.objectAdmin in the project; `gcloud config list` shows account and '
            'project'),
  r'[Qq]uota':
    CloudProblem('over the '
                 'quota', False, 'request more in the console under IAM > Quotas (spot and '
                                 'on-demand are separate), '
            'or use fewer chips'),
  r'no more capacity|[Ss]tock-?out|ZONE_RESOURCE_POOL_EXHAUSTED|RESOURCE_EXHAUSTED|not enough '
  r'.*(capacity|resources)':
    CloudProblem('the zone has no '
                 'capacity', True, 'another --zone, a smaller --tpu or a reservation may help'),
  r'ALREADY_EXISTS|already exists':
    CloudProblem('the name is '
                 'taken', False, '`launch watch NAME` continues it, `launch delete NAME` deletes '
                                 'it'),
  r'not found in zone|Invalid accelerator|is not (available|supported) in|not available in zone':
    CloudProblem('the zone has no such '
                 'TPU', False, '`gcloud compute tpus accelerator-types list --zone=ZONE` lists '
                               'what it has'),
  r'UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|HTTPError 5\d\d|[Cc]onnection|timed out':
    CloudProblem('the cloud does not answer', True, 'it usually recovers'),
}  # fmt: skip
NOT_FOUND = re.compile(r'NOT_FOUND|[Nn]ot ?[Ff]ound')


def find_problem(message: str) -> CloudProblem | None:
  """Return the problem in an error message of gcloud, xpk or kubectl, or None."""
  return next(
    (found for pattern, found in CLOUD_PROBLEMS.items() if re.search(pattern, message)), None
  )
