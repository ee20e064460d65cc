package daemon

import (
	"cmp"
	"context"
	"errors"
	"os"
	"slices"

	"github.com/erofsd/erofsd/blobmgr"
)

// reclaim takes want bytes of disk from images that are in use: it puts as much in doubt,
// the least recently read first, and takes what has been in doubt for long enough once the
// cache is over bytes above its limit. It reports whether something went or is about to.
func (t *fanotifyTransport) reclaim(ctx context.Context, q *quota, want, over int64) (coming bool, err error) {
	vs := t.evictable()
	var errs []error
	for again := true; again; {
		again = false
		chosen := coldest(vs, want)
		vs = slices.DeleteFunc(vs, func(v *device) bool {
			rs := chosen[v.blob]
			if rs == nil {
				return false
			}
			if err := t.doubt(ctx, v, rs); err != nil { // others must give instead
				errs, again = append(errs, err), true
				return true
			}
			return false
		})
	}
	for _, v := range vs {
		all, _ := v.blob.Doubtful()
		coming = coming || all > 0 && q.thaw > 0 && !q.blind
	}
	if before := q.safe(); over > 0 && before > 0 {
		errs = append(errs, t.punchAll(ctx, vs, before, want, over))
	}
	return coming, errors.Join(errs...)
}

// punchAll takes want bytes of vs in regions that nobody reads. If that is less than over
// it takes the rest of that in the others, of what nobody reads there.
func (t *fanotifyTransport) punchAll(ctx context.Context, vs []*device, before uint32, want, over int64) error {
	var errs []error
	freed := int64(0)
	for _, v := range vs {
		if freed < want {
			n, err := t.punch(ctx, v, v.blob.Punch, before, want-freed)
			errs = append(errs, err)
			freed += n
		}
	}
	for _, v := range vs {
		n, err := t.punch(ctx, v, v.blob.PunchRead, before, max(over-freed, 0))
		errs = append(errs, err)
		freed += n
	}
	if freed > 0 {
		t.d.log.Info("took data of images in use from the full cache", "bytes", freed)
	}
	return errors.Join(errs...)
}

// coldest chooses regions of vs, so that want bytes are in doubt.
func coldest(vs []*device, want int64) map[*blobmgr.Blob][]blobmgr.Region {
	for _, v := range vs {
		_, unread := v.blob.Doubtful()
		want -= unread
	}
	if want <= 0 {
		return nil
	}
	var regions []blobmgr.Region
	for _, v := range vs {
		regions = v.blob.Regions(regions)
	}
	slices.SortFunc(regions, func(a, b blobmgr.Region) int { return cmp.Compare(a.Read, b.Read) })
	chosen := map[*blobmgr.Blob][]blobmgr.Region{}
	for _, r := range regions {
		if want <= 0 {
			break
		}
		chosen[r.Blob] = append(chosen[r.Blob], r)
		want -= r.Bytes
	}
	return chosen
}

// evictable returns the devices that no pinned image has.
func (t *fanotifyTransport) evictable() (vs []*device) {
	var images []*image
	t.d.mu.Lock()
	for _, img := range t.d.images {
		images = append(images, img)
	}
	t.d.mu.Unlock()
	pinned := map[*device]bool{}
	for _, img := range images {
		if !img.isOpen() {
			continue
		}
		r, err := t.d.readRecord(img.key)
		for _, v := range img.devices {
			pinned[v] = pinned[v] || r.Pinned || err != nil
		}
	}
	for v, p := range pinned {
		if !p {
			vs = append(vs, v)
		}
	}
	return vs
}

// arm sets the mark of v, so that the kernel asks before it reads v's file, and keeps it
// until unpin. It is an os.ErrClosed when an image of v is being opened or closed: one
// that was complete when its closing began may still be read without anybody to ask.
func (t *fanotifyTransport) arm(v *device) error {
	t.d.mu.Lock()
	defer t.d.mu.Unlock()
	n := 0
	for _, img := range t.d.images {
		for _, w := range img.openDevices() {
			if w == v {
				n++
			}
		}
	}
	if n == 0 || n != v.images {
		return os.ErrClosed
	}
	if !v.mark.on {
		if err := t.group.Watch(v.blob.File(), v); err != nil {
			return err
		}
		v.mark.on = true
	}
	v.mark.pins++
	return nil
}

// openDevices returns img's devices once it is open.
func (img *image) openDevices() []*device {
	if !img.isOpen() {
		return nil
	}
	return img.devices
}

// doubt puts regions of v in doubt. The mark comes first: from then on the kernel asks
// for what it used to read by itself.
func (t *fanotifyTransport) doubt(ctx context.Context, v *device, rs []blobmgr.Region) error {
	if err := t.arm(v); err != nil {
		return ignoreClosed(err)
	}
	defer t.unpin([]*device{v})
	return ignoreClosed(v.blob.Doubt(ctx, rs))
}

// A puncher is Punch or PunchRead of a blob.
type puncher func(ctx context.Context, before uint32, want int64) (int64, error)

func (t *fanotifyTransport) punch(ctx context.Context, v *device, how puncher, before uint32, want int64) (int64, error) {
	if err := t.arm(v); err != nil {
		return 0, ignoreClosed(err)
	}
	defer t.unpin([]*device{v})
	n, err := how(ctx, before, want)
	return n, ignoreClosed(err)
}

// doubtful reports whether anything is in doubt.
func (t *fanotifyTransport) doubtful() bool {
	t.d.mu.Lock()
	defer t.d.mu.Unlock()
	for _, v := range t.d.devices {
		if all, _ := v.blob.Doubtful(); all > 0 {
			return true
		}
	}
	return false
}

// ignoreClosed is nil for what ended meanwhile: it is evicted when nobody uses it.
func ignoreClosed(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// settle looks at all blobs after a round: it takes the marks of those that are complete
// again, and with roomy ends all doubt.
func (t *fanotifyTransport) settle(roomy bool) {
	var vs []*device
	t.d.mu.Lock()
	for _, v := range t.d.devices {
		vs = append(vs, v)
	}
	t.d.mu.Unlock()
	for _, v := range vs {
		if roomy {
			v.blob.Trust()
		}
		t.completed(v)
	}
}
