package main

import (
	"context"
	"encoding/json"
	"net"
	"path/filepath"
	"slices"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A fakeContainerd has namespaces, images and content.
type fakeContainerd struct {
	content
	images map[string]digest.Digest // by namespace and name
}

type content struct {
	contentapi.UnimplementedContentServer
	blobs map[digest.Digest][]byte
}

// put stores a document and returns its digest.
func (c *content) put(t *testing.T, doc any) digest.Digest {
	t.Helper()
	text, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(text)
	c.blobs[d] = text
	return d
}

func (c *content) Info(_ context.Context, r *contentapi.InfoRequest) (*contentapi.InfoResponse, error) {
	text, ok := c.blobs[digest.Digest(r.Digest)]
	if !ok {
		return nil, status.Error(codes.NotFound, "no such content")
	}
	return &contentapi.InfoResponse{Info: &contentapi.Info{Digest: r.Digest, Size: int64(len(text))}}, nil
}

func (c *content) Read(r *contentapi.ReadContentRequest, to contentapi.Content_ReadServer) error {
	for half := range slices.Chunk(c.blobs[digest.Digest(r.Digest)], 100) {
		if err := to.Send(&contentapi.ReadContentResponse{Data: half}); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeContainerd) serve(t *testing.T) *finder {
	t.Helper()
	address := filepath.Join(t.TempDir(), "c.sock")
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	namespacesapi.RegisterNamespacesServer(s, namespaceList{})
	imagesapi.RegisterImagesServer(s, imageStore{f: f})
	contentapi.RegisterContentServer(s, &f.content)
	ended := make(chan struct{})
	go func() { defer close(ended); _ = s.Serve(l) }() // until it is stopped
	t.Cleanup(func() { s.Stop(); <-ended })
	found, err := newFinder(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(found.close)
	return found
}

type namespaceList struct {
	namespacesapi.UnimplementedNamespacesServer
}

func (namespaceList) List(context.Context, *namespacesapi.ListNamespacesRequest) (*namespacesapi.ListNamespacesResponse, error) {
	return &namespacesapi.ListNamespacesResponse{Namespaces: []*namespacesapi.Namespace{{Name: "a"}, {Name: "b"}}}, nil
}

type imageStore struct {
	imagesapi.UnimplementedImagesServer
	f *fakeContainerd
}

func (s imageStore) Get(ctx context.Context, r *imagesapi.GetImageRequest) (*imagesapi.GetImageResponse, error) {
	ns, _ := namespaces.Namespace(ctx)
	d, ok := s.f.images[ns+" "+r.Name]
	if !ok {
		return nil, status.Error(codes.NotFound, "no such image")
	}
	return &imagesapi.GetImageResponse{Image: &imagesapi.Image{Name: r.Name, Target: &types.Descriptor{Digest: d.String()}}}, nil
}

// TestTops finds the uppermost layers of an image's platforms, as far as they were pulled.
func TestTops(t *testing.T) {
	c := &fakeContainerd{images: map[string]digest.Digest{}}
	c.blobs = map[digest.Digest][]byte{}
	layers := []digest.Digest{digest.FromString("low"), digest.FromString("high")}
	manifest := func(ids []digest.Digest) ocispec.Descriptor {
		config := c.put(t, ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: ids}})
		return ocispec.Descriptor{Digest: c.put(t, ocispec.Manifest{Config: ocispec.Descriptor{Digest: config}})}
	}
	both, low := manifest(layers), manifest(layers[:1])
	index := c.put(t, ocispec.Index{Manifests: []ocispec.Descriptor{both, low, {Digest: digest.FromString("of a platform that was not pulled")}}})
	c.images["b registry.example/app:1"], c.images["a registry.example/low:1"] = index, low.Digest
	f := c.serve(t)
	top := identity.ChainID(slices.Clone(layers)).String()
	for name, want := range map[string][]string{
		"registry.example/app:1": {top, layers[0].String()}, "registry.example/low:1": {layers[0].String()}, "none": nil,
	} {
		if got, err := f.tops(t.Context(), name); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
}
