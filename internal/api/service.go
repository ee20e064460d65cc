package api

import (
	"context"
	"net/http"
)

// A Service does what the API offers. Its methods are safe for concurrent use.
type Service interface {
	Mount(ctx context.Context, r MountRequest) (Mount, error)
	Unmount(ctx context.Context, r UnmountRequest) error
	BindImage(ctx context.Context, r BindRequest) error
	UnbindImage(ctx context.Context, r ImageRequest) error
	// Remove removes a kept image that nobody uses.
	Remove(ctx context.Context, r RemoveRequest) error
	Pin(ctx context.Context, r PinRequest) error
	Prefetch(ctx context.Context, r PrefetchRequest) error
	Usage(ctx context.Context, r ImageRequest) (Usage, error)

	Status(ctx context.Context) (Status, error)
	Cache(ctx context.Context) (Cache, error)
	Evict(ctx context.Context, r EvictRequest) (Cache, error)
	Upgrade(ctx context.Context, r UpgradeRequest) error
	// Scrub verifies what the cache has and repairs what is wrong.
	Scrub(ctx context.Context, r ScrubRequest) (Scrub, error)
	Version(ctx context.Context) (VersionInfo, error)
	// Health is an error when the daemon does not serve the kernel.
	Health(ctx context.Context) error
}

// An Error is an answer other than success. Message is a sentence for a person.
type Error struct {
	Status  int    `json:"-"` // HTTP status
	Message string `json:"error"`
}

func (e *Error) Error() string { return e.Message }

// BadRequest is an error that the caller can mend: err says what is wrong.
func BadRequest(err error) error { return &Error{http.StatusBadRequest, err.Error()} }

// Conflict is an error caused by what is there already: a busy mount point.
func Conflict(err error) error { return &Error{http.StatusConflict, err.Error()} }

// NotFound is an error about something that is not there.
func NotFound(err error) error { return &Error{http.StatusNotFound, err.Error()} }

// Unavailable is an error about a daemon that does not serve now.
func Unavailable(err error) error { return &Error{http.StatusServiceUnavailable, err.Error()} }
