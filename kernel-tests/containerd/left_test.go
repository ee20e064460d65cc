package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/moby/sys/mountinfo"
)

// This is what a round of the kill matrix may leave: the other image, and one of each process.

// snapshotsLeft reports what the snapshotter has beside the layers of the other image.
func (k *killed) snapshotsLeft(ctx context.Context) error {
	var keys []string
	err := k.SnapshotService(snapshotterName).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		keys = append(keys, info.Name)
		return nil
	})
	if err == nil && len(keys) != k.layers {
		err = fmt.Errorf("the snapshots are %q, want %d", keys, k.layers)
	}
	return err
}

// filesLeft reports directories of the snapshotter that are nobody's, and mounts.
func (k *killed) filesLeft() error {
	for name, n := range map[string]int{"snapshots": k.layers, "trash": 0, "new": 0} {
		entries, err := os.ReadDir(filepath.Join(k.dir, "snapshots", name))
		if err != nil || len(entries) != n {
			return errors.Join(fmt.Errorf("%d in %s, want %d", len(entries), name, n), err)
		}
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(k.dir))
	if err != nil {
		return err
	}
	for i, m := range mounts {
		if i > 0 || m.FSType != "erofs" || filepath.Base(m.Mountpoint) != "mnt" {
			return fmt.Errorf("%s is mounted at %s", m.FSType, m.Mountpoint)
		}
	}
	return nil
}

// imagesLeft reports images that the daemon has beside the other one.
func (k *killed) imagesLeft(ctx context.Context) error {
	st, err := k.daemon.Status(ctx)
	if err != nil {
		return err
	}
	records, err := filepath.Glob(filepath.Join(k.dir, "snapshots", "snapshots", "*", "image.json"))
	if err != nil || len(records) > 1 {
		return errors.Join(fmt.Errorf("the records are %q", records), err)
	}
	var other struct{ Image string }
	for _, name := range records {
		text, err := os.ReadFile(name)
		if err == nil {
			err = json.Unmarshal(text, &other)
		}
		if err != nil {
			return err
		}
	}
	if len(st.Images) > 1 || len(st.Images) == 1 && st.Images[0].ID != other.Image {
		return fmt.Errorf("the daemon has mounted %+v", st.Images)
	}
	for _, i := range st.Kept {
		if i.ID != other.Image {
			return fmt.Errorf("the daemon keeps %+v", st.Kept)
		}
	}
	return nil
}

// processesLeft reports processes of the node beside one of each.
func (k *killed) processesLeft() error {
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	count := map[string]int{}
	for _, name := range names {
		line, err := os.ReadFile(name)
		if err != nil || !bytes.Contains(line, []byte(k.dir+"/")) {
			continue // it has ended, or is somebody else's
		}
		program, _, _ := strings.Cut(string(line), "\x00")
		count[filepath.Base(program)]++
	}
	want := map[string]int{"containerd": 1, "containerd-erofsd-grpc": 1, "erofsd": 2, "erofsd-guard": 1, "erofsd-mounter": 1} // keeper and worker, and its helpers
	if fmt.Sprint(count) != fmt.Sprint(want) {
		return fmt.Errorf("the processes are %v, want %v", count, want)
	}
	return nil
}

// inState reports whether a process is in a state of proc(5).
func inState(pid int, state byte) error {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if os.IsNotExist(err) && state == 'Z' {
		return nil // and somebody has waited for it
	}
	if err != nil {
		return err
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	if after == "" || after[0] != state {
		return fmt.Errorf("process %d is in state %.1s", pid, after)
	}
	return nil
}
