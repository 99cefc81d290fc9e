"""Every option of a run, once. Imports pydantic only, so a config parses without torch."""

from math import ceil
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from configs.bridge import BridgeConfig, check_bridge
from configs.checkpoint import CheckpointConfig
from configs.data import DataConfig, check_data
from configs.engines import RolloutConfig
from configs.environment import EnvironmentConfig, check_environment
from configs.errors import ConfigError
from configs.gkd import GKDConfig, check_gkd
from configs.grpo import GRPOConfig, check_grpo
from configs.record import RecordConfig
from configs.rewards import RewardConfig, RewardWorkersConfig
from configs.section import Names, Section
from configs.sft import SFTConfig
from configs.sizes import Duration
from configs.teacher import TeacherConfig, check_teacher
from configs.tuner import TunerConfig, check_tuner
from configs.unused import check_algorithms_own
from configs.vision import VisionConfig, check_vision


class ModelConfig(Section):
    """The policy, its reference and its teacher."""

    model: str | None = Field(default=None, min_length=1)
    """Directory with a Hugging Face checkpoint, or a hub name on a machine that reaches the hub."""
    mcore_model: Path | None = None
    """Megatron torch_dist checkpoint to take the weights from; config and tokenizer are in it or in `model`."""
    ref_model: str | None = None
    """Reference for the KL term; by default the model as it was at the start."""
    mcore_ref_model: Path | None = None
    """Megatron torch_dist checkpoint of the reference."""
    teacher_model: str | None = Field(default=None, min_length=1)
    """Teacher of gkd, or of grpo with teacher_kl_coef: a model with the same tokenizer."""
    mcore_teacher_model: Path | None = None
    """Megatron torch_dist checkpoint of the teacher."""
    torch_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the trained parameters and of the engines. In bfloat16 the optimizer keeps float32 copies."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where trainers and engines run. Only cpu has been run by this project so far."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.model is None and self.mcore_model is None:
            raise ValueError("give model.model, or model.mcore_model with config and tokenizer in it")
        return self


class LayoutConfig(Section):
    """How a model is spread over Megatron-core ranks. Names are Megatron's."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the layers, in order."""
    context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the tokens of each sequence; of weights they are replicas. For long sequences."""
    data_parallel_size: int = Field(default=1, ge=1)
    """Replicas; ranks in total = tensor x pipeline x context x data."""
    expert_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the experts of a layer, taken from the tensor-, context- and data-parallel ranks."""
    expert_tensor_parallel_size: int | None = Field(default=None, ge=1)
    """Ranks that share each expert's matrices; by default the tensor-parallel size."""
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2)
    """Chunks of layers on each pipeline rank (interleaved schedule)."""
    num_layers_in_first_pipeline_stage: int | None = Field(default=None, ge=1)
    """Layers of the first stage when they are not spread evenly; the middle stages share the rest."""
    num_layers_in_last_pipeline_stage: int | None = Field(default=None, ge=1)
    """Layers of the last stage when they are not spread evenly."""
    pipeline_model_parallel_layout: str | None = None
    """Every stage spelled out, in Megatron's notation: `Et*3|t*4|t*3,L` (E embedding, t layer, m MTP, L loss)."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks along the sequence."""

    @property
    def world_size(self) -> int:
        """Number of Megatron ranks."""
        replicas = self.context_parallel_size * self.data_parallel_size
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * replicas

    def replica_of(self, rank: int) -> int:
        """Data-parallel position of a rank: Megatron counts tensor- and context-parallel ones first."""
        share = self.tensor_model_parallel_size * self.context_parallel_size
        return rank // share % self.data_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share each expert's matrices."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size


class TrainerConfig(LayoutConfig):
    """The Megatron-core ranks, the optimizer and its schedule. Names are Megatron's."""

    micro_batch_size: int = Field(default=8, ge=1)
    """Samples packed into one micro-batch of one data-parallel rank. Does not change the gradient."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens packed into one micro-batch, in place of a number of samples; as many at least as the longest sample
    may have. Does not change the gradient."""
    packing: bool = True
    """Put samples side by side; `false` pads each to the longest. Does not change the gradient."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Compute again in the backward pass what would be kept: whole layers, or only attention (Megatron's)."""
    recompute_num_layers: int = Field(default=1, ge=1)
    """With `full`: layers between two activations that are kept."""
    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the schedule after the warm-up."""
    lr_warmup_iters: int = Field(default=0, ge=0)
    """Optimizer steps from zero to the peak learning rate; the rate of the first one is zero, as in Megatron."""
    lr_warmup_fraction: float | None = Field(default=None, ge=0, lt=1)
    """The same as a share of the run's optimizer steps, rounded up; in place of lr_warmup_iters."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of Adam's second moment."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Added to Adam's denominator."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient over all ranks; 0 turns clipping off."""
    use_distributed_optimizer: bool = True
    """Split the optimizer state over the data-parallel ranks."""
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of each layer's load-balancing loss for experts, E sum f P (docs/algorithms.md). The shares are of a
    whole optimizer step, so that the gradient does not depend on micro-batches, which takes one more forward pass;
    Megatron's kinds of this loss do depend on them. At 0, the default, the load is only logged."""
    moe_z_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of each layer's z-loss, which keeps routers' logits small; takes the same forward pass."""
    deterministic_mode: bool = False
    """Only kernels that give the same bits each time (Megatron's name). Slower on a GPU, where it is untested, and
    an error where torch has none; on a CPU the trainer is deterministic anyway. Engines are not covered."""
    freeze: Names = ()
    """Parameters that are not trained: patterns (`*`, `?`, `[0-9]`) of whole Hugging Face names."""


class ClusterConfig(Section):
    """What is asked of Ray. Without an address, here or in the environment, a local Ray is started."""

    address: str | None = None
    """Address of a running Ray; `RAY_ADDRESS` and `ray job submit` are honoured as well."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs a locally started Ray offers; by default the machine's."""
    cpus_per_trainer_rank: float = Field(default=0.5, gt=0)
    """CPUs reserved for each Megatron rank, and threads that it computes with."""
    cpus_per_engine: float = Field(default=0.5, gt=0)
    """CPUs reserved for each vLLM engine, and on CPU threads that it computes with."""
    node_label: str | None = Field(default=None, min_length=1)
    """Label of a cluster's nodes that says whose they are: trainer, rollout (engines, rewards, environments) or
    bridge. By default every node is everybody's; a Ray that the command starts itself has no labels."""
    placement_timeout_s: float = Field(default=60.0, gt=0)
    """How long to wait for the reserved resources."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """How long ranks and engines may take to start and load."""
    step_timeout_s: float = Field(default=1800.0, gt=0)
    """How long any one phase of a step may take."""
    collective_timeout_s: float = Field(default=300.0, gt=0)
    """How long a rank waits for another in a collective."""
    grace_s: float | None = Field(default=None, gt=0)
    """Seconds that a SIGTERM leaves until SIGKILL. By default 30; under `ray job submit` RAY_JOB_STOP_WAIT_TIME_S,
    which is 3 unless the job's env_vars set it."""
    max_trainer_restarts: int = Field(default=3, ge=0)
    """How often in a row the trainer ranks are started again from the newest state after one of them is lost; a
    step that is done for the first time begins the count anew."""


class RunConfig(Section):
    """A run: everything that decides its outcome."""

    algorithm: Literal["grpo", "gkd", "sft"] = "grpo"
    """Set by the command; in a file it tells which command the file is for."""
    output_dir: Path = Path("runs/run")
    """Everything the run writes is in here."""
    exist_ok: bool = False
    """Allow an output directory that already holds a run; its files are replaced."""
    seed: int = Field(default=42, ge=0)
    """Seed of data order, sampling and initialisation."""
    max_steps: int = Field(default=100, ge=1)
    """Generation steps (grpo) or optimizer steps (gkd; sft, unless sft.num_train_epochs decides)."""
    time_limit: Duration | None = None
    """Wall clock for the whole command, such as 4h, 90m or seconds: before it is over a state is saved and the run
    ends with exit code 0, to go on when it is started again."""
    eval_steps: int = Field(default=0, ge=0)
    """Evaluate every this many steps, besides before and after; 0 for only those."""
    model: ModelConfig
    trainer: TrainerConfig = TrainerConfig()
    tuner: TunerConfig = TunerConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher: TeacherConfig = TeacherConfig()
    grpo: GRPOConfig = GRPOConfig()
    gkd: GKDConfig = GKDConfig()
    sft: SFTConfig = SFTConfig()
    data: DataConfig
    vision: VisionConfig = VisionConfig()
    rewards: tuple[RewardConfig, ...] = ()
    reward_workers: RewardWorkersConfig = RewardWorkersConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    bridge: BridgeConfig = BridgeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    record: RecordConfig = RecordConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("tuner")
    @classmethod
    def _dropout_of_the_algorithm(cls, tuner: TunerConfig, info: ValidationInfo) -> TunerConfig:
        # An algorithm that is none has been refused, and is not there.
        return tuner.with_dropout(info.data["algorithm"]) if "algorithm" in info.data else tuner

    @property
    def loss_temperature(self) -> float:
        """What the trainer divides logits by: the sampling temperature for grpo, so that both agree."""
        match self.algorithm:
            case "grpo":
                return self.grpo.temperature
            case "gkd":
                return self.gkd.divergence_temperature
            case "sft":
                return 1.0

    @property
    def has_engines(self) -> bool:
        """Whether the policy itself completes prompts."""
        return self.algorithm == "grpo" or (self.algorithm == "gkd" and self.gkd.lmbda > 0)

    @property
    def has_teacher(self) -> bool:
        """Whether a second model is asked what it thinks of completions."""
        return self.algorithm == "gkd" or (self.algorithm == "grpo" and self.grpo.teacher_kl_coef > 0)

    @property
    def teacher_place(self) -> Literal["trainer", "engine", "server"]:
        """Where the teacher is, if the run has one."""
        return "server" if self.teacher.servers else self.teacher.teacher_backend

    @property
    def max_completion_length(self) -> int:
        """Longest completion that engines are asked for."""
        return self.gkd.max_completion_length if self.algorithm == "gkd" else self.grpo.max_completion_length

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run, for the learning-rate schedule."""
        return self.max_steps * (self.grpo.optimizer_steps if self.algorithm == "grpo" else 1)

    @property
    def lr_warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        fraction = self.trainer.lr_warmup_fraction
        return self.trainer.lr_warmup_iters if fraction is None else ceil(fraction * self.optimizer_steps)

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after this step: every `eval_steps`, and after the last one."""
        return step == self.max_steps or (self.eval_steps > 0 and step % self.eval_steps == 0)

    def saves_at(self, step: int) -> bool:
        """Whether `checkpoint-STEP` is due after this step; the last one is saved as `checkpoint` anyway."""
        every = self.checkpoint.save_steps
        return every > 0 and step % every == 0 and step < self.max_steps

    def records_tokens_at(self, step: int) -> bool:
        """Whether this step's tokens are written: the first step's, and then every `record.token_steps`."""
        every = self.record.token_steps
        return every > 0 and (step == 1 or step % every == 0)

    @model_validator(mode="after")
    def _rules_between_sections(self) -> Self:
        trainer, grpo = self.trainer, self.grpo
        if self.algorithm == "grpo":
            has_rewards = bool(self.rewards) or self.environment.function is not None
            if not has_rewards and not self.has_teacher:
                raise ValueError("rewards: grpo needs at least one reward function, or grpo.teacher_kl_coef")
            check_grpo(grpo, has_rewards=has_rewards)
            room, counts = self.rollout.max_num_seqs, (grpo.num_generations, grpo.eval_num_generations)
            for name, count in zip(("num_generations", "eval_num_generations"), counts, strict=True):
                if count > room:
                    raise ValueError(
                        f"rollout.max_num_seqs: {room} is less than grpo.{name} {count}; one group must fit "
                        "into an engine"
                    )
            if grpo.sync_ref_model and self.tuner.tuner_type == "lora":
                raise ValueError(
                    "grpo.sync_ref_model: moves a whole reference; it needs tuner.tuner_type full"
                )
        check_teacher(self)
        if self.algorithm == "gkd":
            check_gkd(self.gkd, self.teacher_place)
        check_algorithms_own(self)
        check_environment(self)
        check_data(self.data)
        check_tuner(self.tuner)
        check_vision(self.vision)
        self._check_lora_engines()
        check_bridge(self.bridge, self.cluster.collective_timeout_s)
        if trainer.sequence_parallel and trainer.tensor_model_parallel_size == 1:
            raise ValueError(
                "trainer.sequence_parallel: needs trainer.tensor_model_parallel_size of 2 or more"
            )
        if trainer.min_lr > trainer.lr:
            raise ValueError(f"trainer.min_lr: {trainer.min_lr} is above trainer.lr {trainer.lr}")
        if trainer.freeze and self.tuner.tuner_type == "lora":
            raise ValueError(
                "trainer.freeze: is not used with tuner.tuner_type lora, which trains adapters alone"
            )
        self._check_steps()
        return self

    def _check_steps(self) -> None:
        trainer = self.trainer
        if trainer.lr_warmup_fraction is not None and trainer.lr_warmup_iters:
            raise ValueError("trainer.lr_warmup_fraction: give it or trainer.lr_warmup_iters, not both")
        if self.algorithm == "sft" and self.sft.num_train_epochs is not None:
            if self.data.streaming:
                raise ValueError(
                    "sft.num_train_epochs: how many steps these are is unknown with data.streaming; give max_steps"
                )
            # Not whether it was typed, so that a dump loads back.
            if self.max_steps != RunConfig.model_fields["max_steps"].default:
                raise ValueError(
                    f"sft.num_train_epochs: give it or max_steps, not both; max_steps is {self.max_steps}"
                )
        else:
            self.check_warmup()

    def check_warmup(self) -> None:
        """Raises ValueError when there is no step after the warm-up."""
        if self.optimizer_steps <= self.lr_warmup_steps:
            name = "lr_warmup_iters" if self.trainer.lr_warmup_fraction is None else "lr_warmup_fraction"
            raise ValueError(
                f"trainer.{name}: a warm-up of {self.lr_warmup_steps} steps leaves none of the run's "
                f"{self.optimizer_steps} after it"
            )

    def _check_lora_engines(self) -> None:
        if not self.rollout.vllm_enable_lora:
            return
        if self.tuner.tuner_type != "lora":
            raise ValueError("rollout.vllm_enable_lora: needs tuner.tuner_type lora")
        if self.tuner.modules_to_save:
            raise ValueError(
                "rollout.vllm_enable_lora: engines cannot replace whole modules, which tuner.modules_to_save asks "
                "for; set it to false, so that merged weights are sent"
            )
        if self.model.mcore_model is not None:
            raise ValueError(
                "rollout.vllm_enable_lora: engines read the base model from safetensors; give it as model.model "
                "instead of model.mcore_model"
            )


def with_steps_of_epochs(config: RunConfig, num_samples: int) -> RunConfig:
    """The config with max_steps in place of sft.num_train_epochs, if it has that.

    Raises ConfigError when the warm-up does not leave a step.
    """
    epochs = config.sft.num_train_epochs
    if epochs is None:
        return config
    steps = ceil(epochs * num_samples / config.sft.batch_size)
    sft = config.sft.model_copy(update={"num_train_epochs": None})
    config = config.model_copy(update={"max_steps": steps, "sft": sft})
    try:
        config.check_warmup()
    except ValueError as error:
        raise ConfigError(f"{error}; sft.num_train_epochs {epochs:g} is {steps} steps") from None
    return config
