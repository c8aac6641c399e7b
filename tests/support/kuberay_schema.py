"""What a RayJob manifest may say, as far as configs/cluster/kuberay.yaml uses it; unknown fields are refused.

KubeRay's resource definitions are not on PyPI. Written after the published API reference of ray.io/v1
(https://ray-project.github.io/kuberay/reference/api/, RayJobSpec to WorkerGroupSpec) and, for pods and claims, of
Kubernetes (https://kubernetes.io/docs/reference/kubernetes-api/, PodSpec and PersistentVolumeClaimSpec). It is a
subset: a field the reference has and this file lacks is to be added here.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
"""An RFC 1123 label."""
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
"""Values are strings: a bare number is refused by the API server."""
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
PATH: Schema = {"type": "string", "pattern": "^/"}


def record(required: str = "", **properties: Schema) -> Schema:
    """Return the schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def many(items: Schema) -> Schema:
    """Return the schema of a list with at least one item."""
    return {"type": "array", "items": items, "minItems": 1}


METADATA = record("name", name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
AMOUNTS = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = record(requests=AMOUNTS, limits=AMOUNTS)
CONTAINER = record(
    "name image",
    name=NAME,
    image=TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    env=many(record("name", name=TEXT, value={"type": "string"}, valueFrom={"type": "object"})),
    ports=many(record("containerPort", containerPort={**COUNT, "maximum": 65535}, name={**NAME, "maxLength": 15})),
    resources=RESOURCES,
    volumeMounts=many(record("name mountPath", name=NAME, mountPath=PATH, readOnly={"type": "boolean"})),
)
VOLUME = record(
    "name",
    name=NAME,
    emptyDir=record(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
    persistentVolumeClaim=record("claimName", claimName=NAME, readOnly={"type": "boolean"}),
)
TOLERATION = record(
    key=TEXT,
    operator={"enum": ["Exists", "Equal"]},
    value={"type": "string"},
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
TEMPLATE = record(
    "spec",
    metadata=record(labels=TEXTS, annotations=TEXTS),
    spec=record(
        "containers",
        containers=many(CONTAINER),
        volumes=many(VOLUME),
        tolerations=many(TOLERATION),
        nodeSelector=TEXTS,
        securityContext=record(fsGroup=COUNT, runAsUser=COUNT, runAsNonRoot={"type": "boolean"}),
    ),
)
HEAD = record(
    "template",
    template=TEMPLATE,
    rayStartParams=TEXTS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    enableIngress={"type": "boolean"},
)
WORKERS = record(
    "groupName template",
    groupName=NAME,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    numOfHosts=COUNT,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
CLUSTER = record(
    "headGroupSpec workerGroupSpecs rayVersion",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=record(
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
        resources=RESOURCES,
    ),
    headGroupSpec=HEAD,
    workerGroupSpecs=many(WORKERS),
)
RAY_JOB = record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=METADATA,
    spec=record(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        backoffLimit=COUNT,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        runtimeEnvYAML=TEXT,
        suspend={"type": "boolean"},
        rayClusterSpec=CLUSTER,
    ),
)
CLAIM = record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "v1"},
    kind={"const": "PersistentVolumeClaim"},
    metadata=METADATA,
    spec=record(
        "accessModes resources",
        accessModes=many({"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]}),
        resources=RESOURCES,
        storageClassName=NAME,
    ),
)
KINDS = {"RayJob": RAY_JOB, "PersistentVolumeClaim": CLAIM}
