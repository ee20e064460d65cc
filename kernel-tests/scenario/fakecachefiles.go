package scenario

import (
	"context"
	"testing"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/cachefiles/cachefilestest"
	"github.com/erofsd/erofsd/internal/daemon"
)

// A fakeCachefiles is cachefilestest's kernel with EROFS on top.
type fakeCachefiles struct {
	t         testing.TB
	k         *cachefilestest.Kernel
	held      bool // somebody holds the device between daemons
	connected bool // a daemon has had it
	dead      bool // the last of its descriptors was closed by force
}

func newFakeCachefiles(t testing.TB, held bool) *fakeCachefiles {
	return &fakeCachefiles{t: t, k: cachefilestest.New(t), held: held}
}

// connect gives a daemon the device. After the death of a cache the new one begins with
// an empty disk: the fake one is lost with its kernel.
func (c *fakeCachefiles) connect(testing.TB) daemon.FakeKernel {
	inherited := c.connected && c.held
	if c.dead {
		c.k, c.dead = cachefilestest.New(c.t), false
	}
	c.connected = true
	return daemon.FakeKernel{Device: c.k.Device(), Inherited: inherited}
}

func (c *fakeCachefiles) mount(ctx context.Context, s daemon.MountSpec) (*superblock, error) {
	volume := cachefiles.VolumeKey(s.Domain, s.FSID)
	boot, err := c.open(ctx, cachefiles.Key{Volume: volume, Cookie: s.FSID})
	if err != nil {
		return nil, err
	}
	var volumes []volumeObject
	for _, cookie := range s.Cookies {
		v, err := c.open(ctx, cachefiles.Key{Volume: volume, Cookie: cookie})
		if err != nil {
			return nil, closeObjects(append(volumes, boot), err)
		}
		volumes = append(volumes, v)
	}
	return newSuperblock(boot, boot.o.Size(), asVolumes(volumes))
}

func (c *fakeCachefiles) open(ctx context.Context, k cachefiles.Key) (volumeObject, error) {
	o, err := c.k.Open(ctx, k)
	return volumeObject{o}, err
}

func closeObjects(list []volumeObject, err error) error {
	for _, v := range list {
		v.Close()
	}
	return err
}

func asVolumes(list []volumeObject) []volume {
	var out []volume
	for _, v := range list {
		out = append(out, v)
	}
	return out
}

func (c *fakeCachefiles) sever() { c.k.Kill() }

func (c *fakeCachefiles) gone() {
	if !c.held {
		c.dead = true
		c.k.Die()
	}
}

func (c *fakeCachefiles) awaitMount(t testing.TB) {
	await(t, "an OPEN that nobody answers", func() bool { return c.k.Pending() > 0 })
}

func (c *fakeCachefiles) fail(err error) { c.k.FailWrites(err) }

// A volumeObject is an object that EROFS reads.
type volumeObject struct{ o *cachefilestest.Object }

func (v volumeObject) ReadAt(p []byte, off int64) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := v.o.ReadAt(ctx, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (v volumeObject) Close() error {
	v.o.Close()
	return nil
}
