package nydus

import "context"

// A Service does what the API offers. Its methods are called concurrently and
// without any lock; those with a context may wait. An error that none of this
// package's constructors made is answered as 500 with its text, so no error may
// hold a secret.
type Service interface {
	// Info never waits: clients take a late answer for a dead daemon.
	Info() DaemonInfo
	// SetLogLevel gets one of off, error, warn, info, debug and trace.
	SetLogLevel(level string) error
	Events() Events

	// Start begins to serve; UnexpectedEvent unless the state is READY.
	Start(ctx context.Context) error
	// Exit begins the end of the process, and returns before the API ends.
	Exit(ctx context.Context) error
	// SendFD gives the state to the supervisor; without one it does nothing.
	SendFD(ctx context.Context) error
	// TakeOver gets the state back. When it fails the state is as before.
	TakeOver(ctx context.Context) error

	Superblock(ctx context.Context, mountpoint string) (Superblock, error)
	Mount(ctx context.Context, mountpoint string, c MountCommand) error
	// Remount changes what Mount made.
	Remount(ctx context.Context, mountpoint string, c MountCommand) error
	Unmount(ctx context.Context, mountpoint string) error

	// PutBlob registers what entry, a JSON document, describes. The same again is success.
	PutBlob(ctx context.Context, entry []byte) error
	// Blobs lists what is registered in the domain; only blobID unless that is empty.
	Blobs(ctx context.Context, domainID, blobID string) ([]BlobInfo, error)
	// DeleteBlob unregisters one blob, or without blobID the whole domain, which is
	// success when there was nothing. The empty domain is one with nothing in it: its
	// blobs go one by one.
	DeleteBlob(ctx context.Context, domainID, blobID string) error
	// CullBlob removes a blob's cache file in every domain.
	CullBlob(ctx context.Context, blobID string) error

	// The statistics take the id of a mount, configuration, blob or snapshot, or
	// nothing for all together. NoCounter if there is none.
	FsStats(id string) (FsStats, error)
	FsFiles(id string, latest bool) (FsFiles, error)
	FsPattern(id string) ([]FilePattern, error)
	Inflight() ([]Inflight, error)
	BackendMetrics(id string) (BackendMetrics, error)
	CacheMetrics(id string) (CacheMetrics, error)

	// Config returns what SetConfig may change: bare keys of one id, or without id
	// all, as id:key.
	Config(id string) (map[string]string, error)
	// SetConfig gets no other keys than those of [ConfigKeys].
	SetConfig(ctx context.Context, id string, values map[string]string) error
}
