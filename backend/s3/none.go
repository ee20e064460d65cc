//go:build nos3

package s3

import (
	"context"
	"errors"
	"fmt"

	"github.com/erofsd/erofsd/backend"
)

var errLeftOut = fmt.Errorf("this erofsd was built without S3 (build tag nos3): %w", errors.ErrUnsupported)

// A Store is never made in this build.
type Store struct{}

// New says that S3 was left out.
func New(Options) (*Store, error) { return nil, errLeftOut }

// Open says that S3 was left out.
func (*Store) Open(context.Context, backend.Ref) (backend.Blob, error) { return nil, errLeftOut }

// Close does nothing.
func (*Store) Close() error { return nil }
