/**
 * The public API: the transfer engine, the KV connector, and whole workers and proxies inside your own program. Anything that is not
 * exported here may change without notice. docs/embedding.md and examples/ show how to use it.
 */

// The transfer engine: tensors and paged KV between two peers.

export { type TransferOptionsInput, transferOptions } from './config/embedded.ts';
export {
  DEFAULT_LIMITS,
  DEFAULT_TIMEOUTS,
  KV_KEYS,
  type KvKey,
  type TransferLimits,
  type TransferOptions,
  type TransferTimeouts,
} from './config/transfer-options.ts';
export type { Logger } from './observability/log.ts';
export { LOG_FORMATS, LOG_LEVELS, type LogLevel, type LogOptions } from './observability/log-options.ts';
export {
  type SendHandle,
  TransferEngine,
  type TransferEngineApi,
  type TransferEngineExtras,
} from './transfer/engine.ts';
export type { FailureKind, FailureState } from './transfer/failures.ts';
export type {
  ConnectionState,
  Drawn,
  FirstTokens,
  HandOverApi,
  HandOverBooks,
  HandOverStage,
  HandOverState,
  HandOverUser,
  MappingState,
  PathState,
  WantRequest,
} from './transfer/native/hand-over-api.ts';
export type { Fallback } from './transfer/native/hello.ts';
export { KvCache } from './transfer/native/kv-cache.ts';
export { NativeTransfer, type NativeTransferOptions } from './transfer/native/native-transfer.ts';
export type { IgnoredKind } from './transfer/native/processes.ts';
export type {
  LoadRequest,
  LoadResult,
  PairState,
  ProxyPing,
  SendRequest,
  SendSource,
  StoredTensor,
  TransferState,
} from './transfer/types.ts';
export { type Fingerprint, fingerprint } from './wire/fingerprint.ts';
export { KV_EVENT_FORMS, type KvEventForm } from './wire/kv-events.ts';
export {
  type KvEventPorts,
  type PingHello,
  type PingMessage,
  SEND_TYPES,
  type SendType,
  type WorkerLoad,
} from './wire/messages.ts';

// The connector: both halves, for a runtime with a scheduler and a paged cache of its own.

export type {
  ConnectorRequest,
  FinishedRequest,
  LoadOutcome,
  SaveOutcome,
  ScheduledRequest,
  SchedulerConnector,
  WorkerConnector,
} from './connector/connector.ts';
export type { ConnectorMetadata, FillMeta, LoadMeta, SaveMeta, WantMeta } from './connector/metadata.ts';
export type { NativeParts, SharedBlocks } from './connector/native-half.ts';
export {
  type KvRole,
  P2pSchedulerConnector,
  type P2pSchedulerConnectorOptions,
} from './connector/scheduler-connector.ts';
export {
  P2pWorkerConnector,
  type P2pWorkerConnectorOptions,
  type SaveTrace,
} from './connector/worker-connector.ts';

// Memory, and the layout of KV in it.

export { createDevice } from './device/create-device.ts';
export type {
  Device,
  DeviceEvent,
  DevicePointer,
  EventRef,
  LayerTensor,
  MemoryRef,
  PagedLayer,
  PinnedPointer,
  Stream,
} from './device/device.ts';
export { cudaEvent, cudaMemory, hostMemory, hostView, pinnedMemory, sliceMemory } from './device/memory.ts';
export { allocatePagedCache, attentionLayerName, type NamedLayer } from './device/paged-cache.ts';
export { WIRE_LAYOUTS, type WireLayout, wireShape } from './kv/families.ts';
export {
  blockBytes,
  type LayoutFamily,
  layerBytes,
  type PagedLayout,
  requestKvBytes,
  runBytes,
  runOffset,
  slotMapping,
} from './kv/layout.ts';
export type { CopyPlan, StridedCopy } from './kv/reblock.ts';
export { DTYPE_BYTES, type Dtype, tensorBytes } from './wire/dtype.ts';

// Ids and addresses.

export type { Address, NamedInstance } from './config/kinds.ts';
export { formatHostPort, type HostPort, parseHostPort } from './net/address.ts';
export type { EtcdAddress } from './net/etcd.ts';
export {
  type EngineRequestId,
  engineRequestId,
  type PeerRole,
  peerAddressOf,
  proxyRequestId,
  SUFFIXED_IDS,
  type SuffixedIds,
  splitTensorId,
  type TensorId,
  type TransferId,
  tensorIdOf,
  transferIdOf,
} from './wire/ids.ts';
export { WIRES, type Wire } from './wire/overlap.ts';
export type { TokenLogprob } from './wire/token-logprob.ts';

// A whole worker and a whole proxy.

export type { AccessConfig } from './config/access-options.ts';
export { type WorkerConfigInput, workerConfig } from './config/embedded.ts';
export {
  POLICIES,
  type Policy,
  type ProxyConfig,
  type ProxyConfigInput,
  proxyConfig,
  type UpstreamAccess,
} from './config/proxy-config.ts';
export {
  type DebugAudience,
  LOAD_FAILURE_POLICIES,
  type LoadFailurePolicy,
  TRANSPORT_CHOICES,
  type TransportChoice,
  WIRE_CHOICES,
  type WireChoice,
  WORKER_ROLES,
  type WorkerConfig,
  type WorkerRole,
} from './config/worker-config.ts';
export { CALL_DIALECTS, type CallDialect } from './parsing/calls.ts';
export { REASONING_DIALECTS, type ReasoningDialect } from './parsing/reasoning.ts';
export { PdProxy } from './proxy/proxy.ts';
export type { Instance, InstancePing, InstanceRole } from './proxy/registry.ts';
export type { CoreInfo, CoreStage, CoreState } from './worker/core-messages.ts';
export { PdWorker } from './worker/worker.ts';

// Errors and metrics.

export { ERROR_TABLE, type ErrorCode, type ErrorContext, type ErrorData, PdError } from './errors.ts';
export {
  METRICS,
  type MetricLabel,
  type MetricName,
  type MetricOfType,
  type MetricSpec,
  MetricsPage,
  readHistogram,
  readMetric,
} from './observability/metrics.ts';
export { createRegistry, type Labels } from './observability/registry.ts';
export type { Facts, Timeline, TimelineStage } from './observability/timelines.ts';
