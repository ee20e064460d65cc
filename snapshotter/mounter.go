package snapshotter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/api"
)

// A Mounter is what the snapshotter wants of the daemon. The API's client is one. Its
// methods are safe for concurrent use; a refusal is an *api.Error, any other error means
// that the daemon could not be asked.
type Mounter interface {
	BindImage(ctx context.Context, r api.BindRequest) error // the same again is success
	Mount(ctx context.Context, r api.MountRequest) (api.Mount, error)
	Unmount(ctx context.Context, r api.UnmountRequest) error
	UnbindImage(ctx context.Context, r api.ImageRequest) error
	Remove(ctx context.Context, r api.RemoveRequest) error
	Prefetch(ctx context.Context, r api.PrefetchRequest) error // of a mounted image
	Usage(ctx context.Context, r api.ImageRequest) (api.Usage, error)
	Status(ctx context.Context) (api.Status, error)
}

// An Origin is where the data of an image come from.
type Origin struct {
	// Config is a configuration of nydus's for the daemon. It may have a login: it is sent
	// and not kept.
	Config json.RawMessage
	Login  bool      // there is a login for it
	Until  time.Time // when the source is to be asked again for the login; zero: not known
	// Unsure: there may be a login that is not known now. The one that the daemon has, if it
	// has any, counts.
	Unsure bool
}

// A Source says where the data of an image come from. The reference is that which it was
// pulled by, or "" when nobody knows.
type Source func(ctx context.Context, reference string) (Origin, error)

// A Finder finds out by which reference an image was pulled whose layers up to the last
// have the given chain id. "" is no error: it is not known.
type Finder func(ctx context.Context, chainID string) (reference string, err error)

// classified gives an error of the daemon the class that containerd's clients know.
func classified(err error) error {
	var refusal *api.Error
	switch {
	case err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded):
		return err
	case !errors.As(err, &refusal):
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	case refusal.Status == http.StatusServiceUnavailable || refusal.Status == http.StatusConflict:
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	case refusal.Status < http.StatusInternalServerError:
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return err
}

// absent reports whether the daemon says that something is not there.
func absent(err error) bool {
	var refusal *api.Error
	return errors.As(err, &refusal) && refusal.Status == http.StatusNotFound
}
