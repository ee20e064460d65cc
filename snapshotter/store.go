package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/erofsd/erofsd/internal/boltcheck"
)

// storeTimeout is how long New waits for another process to let go of the store.
const storeTimeout = 10 * time.Second

// storeVersion is what containerd's metadata store calls the form that it has today.
const storeVersion = "v1"

// checkStore reads all of a store before it is used, and changes nothing. It refuses one that a
// newer version has written: what is not found in it would be taken for removed, and its
// files for garbage; and a damaged one, which would end the process later.
func checkStore(name string) error {
	st, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && st.Size() == 0 {
		return nil
	}
	return unharmed(func() error { return readStore(name) })
}

// unharmed has f open a store; that bbolt panics means that it is damaged.
func unharmed(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // of a file that was cut
	defer func() {
		if p := recover(); p != nil {
			err = damaged(fmt.Errorf("%v", p))
		}
	}()
	return f()
}

// readStore reads all of a store, which nobody else writes to meanwhile. It may panic.
func readStore(name string) error {
	db, err := bolt.Open(name, 0o600, &bolt.Options{Timeout: storeTimeout, ReadOnly: true})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return errors.New("another process has it open; stop that first")
	case errors.Is(err, bolterrors.ErrVersionMismatch):
		return newer(err)
	case err != nil:
		return damaged(err)
	}
	defer db.Close() // nothing was written
	if err := checkPages(name); err != nil {
		return err
	}
	return db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error {
			switch {
			case string(name) != storeVersion:
				return newer(fmt.Errorf("it has %.40q, and only %s is known here", name, storeVersion))
			case b == nil:
				return damaged(fmt.Errorf("%s is no bucket", storeVersion))
			}
			return nil
		})
	})
}

// checkPages reads all of a store without bbolt, which believes what it reads.
func checkPages(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := boltcheck.Check(f, st.Size()); err != nil {
		return damaged(err)
	}
	return nil
}

// newer says what can be done about a store that cannot be understood.
func newer(err error) error {
	return fmt.Errorf("a newer version has written it (%w); install that again, or choose another root", err)
}

// damaged says what can be done about a store that cannot be read.
func damaged(err error) error {
	return fmt.Errorf("it is damaged (%w); move it away and start again: the images have to be pulled anew then", err)
}

// openStore opens the metadata store now, and not at the first call: what is wrong with it
// is a reason not to start.
func (s *Snapshotter) openStore() error {
	name := s.path("metadata.db")
	if err := checkStore(name); err != nil {
		return fmt.Errorf("open snapshotter: %s: %w", name, err)
	}
	store, err := storage.NewMetaStore(name, func(o *bolt.Options) error {
		o.Timeout = storeTimeout
		return nil
	})
	if err != nil {
		return fmt.Errorf("open snapshotter: %s: %w", name, err)
	}
	if err = initStore(store); err == nil {
		err = store.WithTransaction(context.Background(), false, checkNumbers)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("open snapshotter: %s: %w", name, err), store.Close())
	}
	s.store = store
	return nil
}

// checkNumbers refuses a store in which two snapshots have one number, and so one directory: the
// files of the one would go with the other. It needs a transaction.
func checkNumbers(ctx context.Context) error {
	names := make(map[string]string)
	return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
		id, _, _, err := storage.GetInfo(ctx, info.Name)
		if other, ok := names[id]; err == nil && ok {
			err = damaged(fmt.Errorf("snapshots %.100q and %.100q both have number %s", other, info.Name, id))
		}
		names[id] = info.Name
		return err
	})
}

// initStore gives a new store its tables: without them nothing is not found, but an error.
func initStore(store *storage.MetaStore) error {
	err := store.WithTransaction(context.Background(), false, func(ctx context.Context) error {
		_, err := storage.IDMap(ctx)
		return err
	})
	if !errdefs.IsNotFound(err) {
		return err
	}
	return store.WithTransaction(context.Background(), true, func(ctx context.Context) error {
		_, err := storage.CreateSnapshot(ctx, snapshots.KindActive, "first", "")
		if err == nil {
			_, _, err = storage.Remove(ctx, "first")
		}
		return err
	})
}

// maxName is the longest name of a snapshot that the store can have, in bytes.
const maxName = bolt.MaxKeySize

// checkName refuses a name that the store cannot have.
func checkName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("a snapshot needs a name: %w", errdefs.ErrInvalidArgument)
	case len(name) > maxName:
		return fmt.Errorf("the name %.100q… has %d bytes, more than the %d that are possible: %w", name, len(name), maxName, errdefs.ErrInvalidArgument)
	}
	return nil
}

// checkTarget refuses the chain id of a layer that cannot become the name of a snapshot.
func checkTarget(labels map[string]string) error {
	if n := len(labels[labelTarget]); n > maxTarget {
		return fmt.Errorf("the chain id %.100q… (%s) has %d bytes, more than the %d that one can have: %w", labels[labelTarget], labelTarget, n, maxTarget, errdefs.ErrInvalidArgument)
	}
	return nil
}

// maxTarget is the longest chain id that is taken, in bytes: names are made with it.
const maxTarget = 4096
