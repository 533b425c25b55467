# What `import portllm` offers, and where each name lives: the one list of it, for type checkers and for the program.

# The verbs.
from .applying.apply import apply as apply
from .capturing.capture import capture as capture
from .certifying.certificate import read_certificate as read_certificate
from .certifying.certify import certify as certify
from .checkpoint.open import open_checkpoint as open_checkpoint
from .combining.combine import combine as combine
from .diagnosing.doctor import doctor as doctor
from .evaluating.evaluate import evaluate as evaluate
from .exporting.export import export as export
from .fleets.fleet import fleet as fleet
from .inspecting.inspect import inspect as inspect
from .merging.in_place import merge_in_place as merge_in_place, undo_merge as undo_merge
from .merging.merge import merge as merge, merge_each as merge_each
from .patch.adapter_folder import load_patch as load_patch
from .porting.port import port as port, port_each as port_each
from .probing.check import check as check
from .proving.prove import prove as prove
from .running.data import read_data as read_data
from .running.examples import read_examples as read_examples
from .study.run import run_study as run_study, study_results as study_results, study_status as study_status
from .training.train import train as train
from .verifying.sign import sign as sign
from .verifying.verify import verify as verify

# What they take.
from .certifying.inputs import CertifySettings as CertifySettings
from .checkpoint.model.checkpoint import Checkpoint as Checkpoint
from .checkpoint.open import ModelLike as ModelLike
from .combining.plan import Exact as Exact, Selected as Selected
from .evaluating.file_rows import FileRows as FileRows
from .evaluating.harness.source import HarnessRows as HarnessRows
from .evaluating.scoring import Task as Task
from .merging.options import MergeOptions as MergeOptions
from .merging.rounding_modes import Nearest as Nearest, Stochastic as Stochastic
from .patch.adapter_folder import PatchLike as PatchLike
from .patch.patch import Patch as Patch
from .patch.record import FittedTo as FittedTo
from .probing.settings import TextSettings as TextSettings
from .progress import Progress as Progress
from .proving.prove import Endpoint as Endpoint
from .running.data import Data as Data
from .running.examples import Example as Example, ExampleFormat as ExampleFormat
from .training.settings import TrainSettings as TrainSettings
from .verifying.certificate import Certified as Certified
from .verifying.signature import (
    CertificateSigner as CertificateSigner,
    Identity as Identity,
    KeySigner as KeySigner,
    PublicKey as PublicKey,
    Roots as Roots,
    SigstoreSigner as SigstoreSigner,
)

# What they give.
from .applying.apply import Applied as Applied
from .capturing.tuned import TunedReport as TunedReport
from .certifying.certificate import Certificate as Certificate
from .checking.report import CheckReport as CheckReport, PatchReport as PatchReport
from .checking.verdict import Answer as Answer, Verdict as Verdict
from .combining.plan import CombineReport as CombineReport
from .diagnosing.doctor import DoctorReport as DoctorReport
from .evaluating.compare import Comparison as Comparison, ComparisonRow as ComparisonRow
from .exporting.export import Exported as Exported
from .fleets.plan import FleetRow as FleetRow
from .inspecting.inspect import CheckpointSummary as CheckpointSummary, PatchSummary as PatchSummary
from .merging.manifest import MergeReport as MergeReport
from .proving.proof import Proof as Proof
from .study.results.rows import StudyResults as StudyResults
from .study.run import StudyStatus as StudyStatus
from .training.settings import TrainReport as TrainReport
from .verifying.checks import Verification as Verification

# What they raise.
from . import errors as errors
from .errors import (
    AdapterFormatError as AdapterFormatError,
    CertificateError as CertificateError,
    CheckpointError as CheckpointError,
    DataError as DataError,
    DeviceError as DeviceError,
    FleetFileError as FleetFileError,
    HeaderError as HeaderError,
    IndexFileError as IndexFileError,
    InputChangedError as InputChangedError,
    MissingExtraError as MissingExtraError,
    MissingShardError as MissingShardError,
    MissingTensorError as MissingTensorError,
    NonFiniteError as NonFiniteError,
    NotFoundError as NotFoundError,
    OutputBusyError as OutputBusyError,
    OutputError as OutputError,
    OutputExistsError as OutputExistsError,
    PatchError as PatchError,
    PatchRecordError as PatchRecordError,
    PlanRefusedError as PlanRefusedError,
    PortError as PortError,
    PortLLMError as PortLLMError,
    Refusal as Refusal,
    RemoteError as RemoteError,
    RuntimeFailedError as RuntimeFailedError,
    SignatureError as SignatureError,
    StorageError as StorageError,
    StudyFileError as StudyFileError,
    StudyStepError as StudyStepError,
    UnknownMethodError as UnknownMethodError,
    UnsupportedDtypeError as UnsupportedDtypeError,
    WorkersError as WorkersError,
)

__version__: str
