package snapshotter

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) {
	if os.Getenv(crashRoot) != "" {
		if err := crashChild(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	testenv.Main(m)
}

// TestSuite is containerd's own. The name says what it may expect: overlayfs renames no
// directories of lower layers.
func TestSuite(t *testing.T) {
	testenv.Root(t)
	testsuite.SnapshotterSuite(t, "overlayfs", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := New(root, nil, nil)
		if err != nil {
			return nil, nil, err
		}
		return s, s.Close, nil
	})
}
