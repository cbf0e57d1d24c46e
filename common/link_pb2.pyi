from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Greeting(_message.Message):
    __slots__ = ("protocol_version", "software_version")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    software_version: str
    def __init__(self, protocol_version: _Optional[int] = ..., software_version: _Optional[str] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("message_id", "message_type", "group", "body", "attachment_bytes", "ttl_s")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_TYPE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    ATTACHMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    message_type: str
    group: str
    body: bytes
    attachment_bytes: int
    ttl_s: float
    def __init__(self, message_id: _Optional[str] = ..., message_type: _Optional[str] = ..., group: _Optional[str] = ..., body: _Optional[bytes] = ..., attachment_bytes: _Optional[int] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("message_id", "index", "data")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    index: int
    data: bytes
    def __init__(self, message_id: _Optional[str] = ..., index: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("message_id", "indices")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, message_id: _Optional[str] = ..., indices: _Optional[_Iterable[int]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SiteFrame(_message.Message):
    __slots__ = ("greeting", "reply", "chunk", "heartbeat")
    GREETING_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    greeting: Greeting
    reply: Envelope
    chunk: Chunk
    heartbeat: Heartbeat
    def __init__(self, greeting: _Optional[_Union[Greeting, _Mapping]] = ..., reply: _Optional[_Union[Envelope, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class HubFrame(_message.Message):
    __slots__ = ("greeting", "request", "chunk", "want", "heartbeat")
    GREETING_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    greeting: Greeting
    request: Envelope
    chunk: Chunk
    want: Want
    heartbeat: Heartbeat
    def __init__(self, greeting: _Optional[_Union[Greeting, _Mapping]] = ..., request: _Optional[_Union[Envelope, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., want: _Optional[_Union[Want, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Document(_message.Message):
    __slots__ = ("data", "signature")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    signature: bytes
    def __init__(self, data: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class StudyReference(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("digest", "round")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    digest: str
    round: int
    def __init__(self, digest: _Optional[str] = ..., round: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("digest", "reason")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    digest: str
    reason: str
    def __init__(self, digest: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class StudyInfo(_message.Message):
    __slots__ = ("digest", "name", "status", "round", "rounds", "detail", "submitted")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_FIELD_NUMBER: _ClassVar[int]
    digest: str
    name: str
    status: str
    round: int
    rounds: int
    detail: str
    submitted: str
    def __init__(self, digest: _Optional[str] = ..., name: _Optional[str] = ..., status: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., detail: _Optional[str] = ..., submitted: _Optional[str] = ...) -> None: ...

class StudyList(_message.Message):
    __slots__ = ("studies",)
    STUDIES_FIELD_NUMBER: _ClassVar[int]
    studies: _containers.RepeatedCompositeFieldContainer[StudyInfo]
    def __init__(self, studies: _Optional[_Iterable[_Union[StudyInfo, _Mapping]]] = ...) -> None: ...

class SiteStatus(_message.Message):
    __slots__ = ("id", "name", "decision", "online")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    id: int
    name: str
    decision: str
    online: bool
    def __init__(self, id: _Optional[int] = ..., name: _Optional[str] = ..., decision: _Optional[str] = ..., online: _Optional[bool] = ...) -> None: ...

class StudyEvent(_message.Message):
    __slots__ = ("study", "sites", "cohort", "seconds")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    study: StudyInfo
    sites: _containers.RepeatedCompositeFieldContainer[SiteStatus]
    cohort: _containers.RepeatedScalarFieldContainer[int]
    seconds: float
    def __init__(self, study: _Optional[_Union[StudyInfo, _Mapping]] = ..., sites: _Optional[_Iterable[_Union[SiteStatus, _Mapping]]] = ..., cohort: _Optional[_Iterable[int]] = ..., seconds: _Optional[float] = ...) -> None: ...

class RoundInfo(_message.Message):
    __slots__ = ("step", "number", "attempt", "cohort", "seconds", "lost")
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    step: int
    number: int
    attempt: int
    cohort: _containers.RepeatedScalarFieldContainer[int]
    seconds: float
    lost: str
    def __init__(self, step: _Optional[int] = ..., number: _Optional[int] = ..., attempt: _Optional[int] = ..., cohort: _Optional[_Iterable[int]] = ..., seconds: _Optional[float] = ..., lost: _Optional[str] = ...) -> None: ...

class StudyDetail(_message.Message):
    __slots__ = ("study", "manifest", "sites", "rounds")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    study: StudyInfo
    manifest: Document
    sites: _containers.RepeatedCompositeFieldContainer[SiteStatus]
    rounds: _containers.RepeatedCompositeFieldContainer[RoundInfo]
    def __init__(self, study: _Optional[_Union[StudyInfo, _Mapping]] = ..., manifest: _Optional[_Union[Document, _Mapping]] = ..., sites: _Optional[_Iterable[_Union[SiteStatus, _Mapping]]] = ..., rounds: _Optional[_Iterable[_Union[RoundInfo, _Mapping]]] = ...) -> None: ...
